/** Asking the backends: the client's body with what was decided about it, once more without a mask that they don't know. */

import { splitModelName } from '../../shared/wire/protocol.ts';
import type { Rest } from '../backends/attempt.ts';
import { hungUp } from '../backends/call-backend.ts';
import { denseDecision, type Routed, routeEcho } from '../routing/decision.ts';
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
  /** The one that answered last. */
  backend: string | undefined;
  /** Until its first byte. */
  backend_ms: number | undefined;
  /** A byte of the answer is with the client, so nothing is tried again. */
  hasReplied: boolean;
};

export const notAsked = (routed: Routed): Progress => ({
  ...{ routed, wasAsked: false, gaveUp: false },
  ...{ backend: undefined, backend_ms: undefined, hasReplied: false },
});

/** `rest`: how a small whole answer is read, undefined for any other. */
export type Asked = { readonly response: Response; readonly rest: Rest | undefined };

/** What is sent: for whom, under which name, and in the client's own words. */
export type Question = {
  readonly account: Account;
  readonly requestId: string;
  readonly client: ClientBody;
};

type AskParts = Pick<Services, 'backend' | 'config' | 'namedMasks'>;

/** @throws what the backends' `call` throws, MaskrouteError `cancelled` when the client is gone already. */
export async function ask(parts: AskParts, question: Question, progress: Progress): Promise<Asked> {
  const { routed } = progress;
  const asked = await askUnder(routed, parts, question, progress);
  // The client did not ask for the mask, so a mask that the backend cannot use is no error of the client's.
  if (question.account.routable.body.mask != null || !(await isAboutMask(asked.response))) return asked;
  const decision = denseDecision(routed.decision.set, 'unknown_mask');
  return await askUnder({ ...routed, decision }, parts, question, progress);
}

/** Whether the backend refused the request, before it generated anything, for its mask. */
async function isAboutMask(response: Response): Promise<boolean> {
  if (response.ok) return false;
  const body = (await response.clone().json()) as { error: { param?: unknown } };
  return body.error.param === 'mask';
}

async function askUnder(
  routed: Routed,
  { backend, config, namedMasks }: AskParts,
  { account, requestId, client }: Question,
  progress: Progress,
): Promise<Asked> {
  const { caller, routable, patience, signal, hold } = account;
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
  const answer = await backend.call({
    ...{ path: PATHS[client.wire], requestId, tenant: caller.tenant, signal, hold, body },
    timeout_ms: patience.time_ms,
    stall_ms: config.BACKEND_STALL_MS,
    isFullTime: !patience.isShort,
    ...(routable.body.stream === true ? { silence_ms: config.BACKEND_SILENCE_MS } : {}),
    wish: {
      region: routed.assignment.region,
      mask: routed.decision.maskId ?? JSON.stringify(routed.decision.mask),
      model: splitModelName(routable.body.model).model,
    },
    mayRetry: () => !progress.hasReplied,
    onLate: () => {
      progress.gaveUp = true;
    },
  });
  const { response, rest } = answer;
  if (response.ok && typeof routable.body.mask === 'string') namedMasks.met(routable.body.mask);
  Object.assign(progress, { backend: answer.backend, backend_ms: performance.now() - started_ms });
  return { response, rest };
}

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
