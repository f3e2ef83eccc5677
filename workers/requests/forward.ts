/**
 * Forwards a request to backends: the client's body with the routing decision, and again dense if the backend cannot
 * use the mask.
 */

import { type FallbackReason, splitModelName } from '../../shared/wire/protocol.ts';
import type { LiveBackend } from '../backends/backend-state.ts';
import { type Answer, hungUp, type Purpose, RETRIES_MAX, type Retries } from '../backends/call-backend.ts';
import { steadyNow_ms } from '../base/waiting.ts';
import { denseDecision, type RoutableBody, type Routed, routeEcho } from '../routing/decision.ts';
import type { Services } from '../services.ts';
import type { Account } from './admission.ts';

/** The progress of a request at the backends. `ask` updates it as it goes, since a request may end at any moment. */
export type Progress = {
  /** The decision under which a backend was asked last. */
  routed: Routed;
  /** The backends that may have worked on the request, by id. */
  readonly asked: Map<string, LiveBackend>;
  /** Whether a silent backend was abandoned; it may have worked on the request, whatever the result. */
  gaveUp: boolean;
  /** The backend that answered last. */
  backend: string | undefined;
  affinity: Answer['affinity'];
  /** Time until the backend's first byte. */
  backend_ms: number | undefined;
  /** 0 once a byte of the answer was sent to the client. */
  readonly retries: Retries;
};

export const notAsked = (routed: Routed): Progress => ({
  routed,
  asked: new Map(),
  gaveUp: false,
  backend: undefined,
  affinity: undefined,
  backend_ms: undefined,
  retries: { left: RETRIES_MAX },
});

/** `rest`: reads a small non-streaming answer; undefined for any other. */
export type Asked = Pick<Answer, 'response' | 'rest'>;

/** What is forwarded: the account, the completion's name, and the client's body. */
type Question = {
  readonly account: Account;
  readonly requestId: string;
  readonly client: ClientBody;
};

type AskParts = Pick<Services, 'backend' | 'config' | 'namedMasks'>;

/** @throws what the backends' `call` throws; MaskrouteError `cancelled` when the client has already hung up. */
export async function ask(parts: AskParts, question: Question, progress: Progress): Promise<Asked> {
  const { routed } = progress;
  const { time_ms } = question.account.patience;
  const asked = await askUnder(routed, time_ms, parts, question, progress);
  // If routing chose the mask, its refusal is not the client's error.
  if (question.account.routable.body.mask != null) return asked;
  const refusal = await maskRefusal(asked.response);
  if (refusal === null) return asked;
  const decision = denseDecision(routed.decision.set, refusal);
  const left_ms = Math.max(1, time_ms - progress.backend_ms!);
  return await askUnder({ ...routed, decision }, left_ms, parts, question, progress);
}

/** Why the backend cannot use the request's mask; null if it answered, or refused for another reason. */
async function maskRefusal(response: Response): Promise<FallbackReason | null> {
  if (response.ok) return null;
  const { error } = (await response.clone().json()) as { error: { code?: unknown; param?: unknown } };
  if (error.param !== 'mask') return null;
  // It serves other weights under the model's name.
  return error.code === 'mask_model_mismatch' ? 'model_mismatch' : 'unknown_mask';
}

async function askUnder(
  routed: Routed,
  timeout_ms: number,
  { backend, config, namedMasks }: AskParts,
  { account, requestId, client }: Question,
  progress: Progress,
): Promise<Asked> {
  const { caller, routable, patience, signal, hold, trace } = account;
  if (signal.aborted) throw hungUp();
  Object.assign(progress, { routed, backend_ms: undefined });
  const body = forwardedBody(client, {
    ...(account.answerTokensMax === undefined
      ? {}
      : { [client.wire === 'responses' ? 'max_output_tokens' : 'max_tokens']: account.answerTokensMax }),
    mask: routed.decision.mask,
    maskroute: { ...routeEcho(routed), completion: account.completion },
  });
  const started_ms = steadyNow_ms();
  const called = await backend.call({
    request: { path: PATHS[client.wire], requestId, tenant: caller.tenant, body },
    purpose: purposeOf(routed, routable),
    time: {
      timeout_ms,
      isFullTime: !patience.isShort,
      silence_ms: routable.body.stream === true ? config.BACKEND_SILENCE_MS : undefined,
      stall_ms: config.BACKEND_STALL_MS,
    },
    retries: progress.retries,
    asked: progress.asked,
    signal,
    hold,
    trace,
  });
  progress.gaveUp ||= called.gaveUp;
  if (called.kind === 'error') throw called.error;
  const { response, rest, backend: answerer, affinity } = called;
  if (response.ok && typeof routable.body.mask === 'string') namedMasks.met(routable.body.mask);
  Object.assign(progress, { backend: answerer, affinity, backend_ms: steadyNow_ms() - started_ms });
  return { response, rest };
}

export const purposeOf = ({ decision, assignment }: Routed, conversation: RoutableBody): Purpose => ({
  kind: 'completion',
  region: assignment.region,
  model: splitModelName(conversation.body.model).model,
  mask: decision.maskId ?? JSON.stringify(decision.mask),
  needs: decision.needs,
  conversation,
});

const PATHS = {
  chat: '/v1/chat/completions',
  completions: '/v1/completions',
  responses: '/v1/responses',
} as const;

/** A request body: its text, the parsed object, and its wire format. */
export type ClientBody = {
  readonly value: object;
  readonly text: string;
  readonly wire: keyof typeof PATHS;
};

/**
 * The client's text with `added` appended: serializing a prompt again would take longer than parsing it. Only if the
 * client's body has one of the added fields it is serialized again, and `added` takes precedence.
 * @param value the parsed body; neither it nor `added` may be empty.
 */
export function forwardedBody(
  { value, text }: Pick<ClientBody, 'value' | 'text'>,
  added: Record<string, unknown>,
): string {
  if (Object.keys(added).some((name) => Object.hasOwn(value, name))) {
    return JSON.stringify({ ...value, ...added });
  }
  return `${text.slice(0, text.lastIndexOf('}'))},${JSON.stringify(added).slice(1)}`;
}
