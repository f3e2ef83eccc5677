/** Asking the backends: the client's body with what was decided about it, once more without a mask that they don't know. */

import { splitModelName } from '../../shared/wire/protocol.ts';
import { type Answer, hungUp, type Purpose, RETRIES_MAX, type Retries } from '../backends/call-backend.ts';
import { denseDecision, type RoutableBody, type Routed, routeEcho } from '../routing/decision.ts';
import type { Services } from '../services.ts';
import type { Account } from './admission.ts';

/** How far a request got with the backends: `ask` writes it as it goes, since a request may end at any moment. */
export type Progress = {
  /** The decision under which a backend was asked last. */
  routed: Routed;
  /** A backend may have worked on the request. */
  wasAsked: boolean;
  /** A backend was given up in silence: it may have worked on the request, whatever comes of it. */
  gaveUp: boolean;
  /** The backend that answered last. */
  backend: string | undefined;
  affinity: Answer['affinity'];
  /** Until its first byte. */
  backend_ms: number | undefined;
  /** None once a byte of the answer is with the client. */
  readonly retries: Retries;
};

export const notAsked = (routed: Routed): Progress => ({
  ...{ routed, wasAsked: false, gaveUp: false },
  ...{ backend: undefined, affinity: undefined, backend_ms: undefined, retries: { left: RETRIES_MAX } },
});

/** `rest`: how a small whole answer is read, undefined for any other. */
export type Asked = Pick<Answer, 'response' | 'rest'>;

/** What is sent: for whom, under which name, and in the client's own words. */
type Question = {
  readonly account: Account;
  readonly requestId: string;
  readonly client: ClientBody;
};

type AskParts = Pick<Services, 'backend' | 'config' | 'namedMasks'>;

/** @throws what the backends' `call` throws, MaskrouteError `cancelled` when the client is gone already. */
export async function ask(parts: AskParts, question: Question, progress: Progress): Promise<Asked> {
  const { routed } = progress;
  const { time_ms } = question.account.patience;
  const asked = await askUnder(routed, time_ms, parts, question, progress);
  // The client did not ask for the mask, so a mask that the backend cannot use is no error of the client's.
  if (question.account.routable.body.mask != null || !(await isAboutMask(asked.response))) return asked;
  const decision = denseDecision(routed.decision.set, 'unknown_mask');
  const left_ms = Math.max(1, time_ms - progress.backend_ms!);
  return await askUnder({ ...routed, decision }, left_ms, parts, question, progress);
}

/** Whether the backend refused the request, before it generated anything, for its mask. */
async function isAboutMask(response: Response): Promise<boolean> {
  if (response.ok) return false;
  const body = (await response.clone().json()) as { error: { param?: unknown } };
  return body.error.param === 'mask';
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
  Object.assign(progress, { routed, wasAsked: true, backend_ms: undefined });
  const body = forwardedBody(client, {
    ...(account.answerTokensMax === undefined
      ? {}
      : { [client.wire === 'responses' ? 'max_output_tokens' : 'max_tokens']: account.answerTokensMax }),
    mask: routed.decision.mask,
    maskroute: { ...routeEcho(routed), completion: account.completion },
  });
  const started_ms = performance.now();
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
    ...{ signal, hold, trace },
  });
  progress.gaveUp ||= called.gaveUp;
  if (called.kind === 'error') throw called.error;
  const { response, rest, backend: answerer, affinity } = called;
  if (response.ok && typeof routable.body.mask === 'string') namedMasks.met(routable.body.mask);
  Object.assign(progress, { backend: answerer, affinity, backend_ms: performance.now() - started_ms });
  return { response, rest };
}

export const purposeOf = ({ decision, assignment }: Routed, conversation: RoutableBody): Purpose => ({
  kind: 'completion',
  region: assignment.region,
  model: splitModelName(conversation.body.model).model,
  mask: decision.maskId ?? JSON.stringify(decision.mask),
  conversation,
});

const PATHS = {
  chat: '/v1/chat/completions',
  completions: '/v1/completions',
  responses: '/v1/responses',
} as const;

/** A JSON object, the text that it was parsed from, and the wire that it is on. */
export type ClientBody = {
  readonly value: object;
  readonly text: string;
  readonly wire: keyof typeof PATHS;
};

/**
 * The client's own text with `added` at its end: to write a prompt as JSON again would cost more than it costs to parse
 * it. Only where the client itself says something of what is added, all of it is written anew, and `added` wins.
 * @param value not empty, nor is `added`.
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
