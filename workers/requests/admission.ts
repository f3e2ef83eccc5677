/**
 * Letting a request in: what its tenant may ask for, and the tokens that it may take. The reservation is made while
 * the request is routed, so that it costs no time of its own.
 */

import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type ChatMessage, messageText } from '../../shared/wire/openai.ts';
import { splitModelName } from '../../shared/wire/protocol.ts';
import type { Patience } from '../backends/attempt.ts';
import type { TenantPolicy } from '../db/tenant-rows.ts';
import type { Hold } from '../http/waiting.ts';
import type { RoutableBody, Routed } from '../routing/decision.ts';
import type { Caller } from '../tenants/api-keys.ts';
import type { Budgets } from '../tenants/budgets.ts';
import { isUnlimited } from '../tenants/ledger.ts';
import type { CompletionIds } from './completion-ids.ts';
import { openRecord, type RecordParts, type RequestRecord } from './request-record.ts';
import type { Models } from './served-models.ts';

/*
 * How many tokens a request can cost at most, told before it runs. The edge has no tokenizer of the model, but a
 * byte-level tokenizer never makes more tokens than there are bytes, and no sequence is longer than the context.
 */

export type TokenBounds = {
  readonly prompt_tokens: number;
  /** With the longest answer that the request allows. */
  readonly wanted_tokens: number;
  /** What must be granted; fewer than wanted when the client left the length open. */
  readonly least_tokens: number;
  readonly choices: number;
  /** Whether the client said how long the answer may get. */
  readonly isOpen: boolean;
};

/** What a chat template adds: markers a message, and a system prompt of its own. */
const TEMPLATE_TOKENS = 32;
const MESSAGE_TOKENS = 8;
/** Of an answer whose length the client left open, at least this much has to be possible. */
const OPEN_ANSWER_LEAST_TOKENS = 16;
/** OpenAI's default for the legacy endpoint. */
const COMPLETION_DEFAULT_TOKENS = 16;
/** While no backend says what its context is. */
const CONTEXT_UNKNOWN_TOKENS = 32_768;

export function tokenBounds(request: RoutableBody, context_tokens: number): TokenBounds {
  const prompts = promptBounds(request).map((tokens) => Math.min(tokens, context_tokens));
  const prompt_tokens = prompts.reduce((sum, tokens) => sum + tokens, 0);
  const choices = prompts.length * (request.body.n ?? 1);
  const asked = answerTokens(request);
  const longest = Math.min(asked ?? context_tokens, context_tokens);
  const wanted_tokens = prompt_tokens + choices * longest;
  const isOpen = asked === undefined;
  const least = Math.min(longest, OPEN_ANSWER_LEAST_TOKENS);
  return {
    prompt_tokens,
    wanted_tokens,
    least_tokens: isOpen ? prompt_tokens + choices * least : wanted_tokens,
    choices,
    isOpen,
  };
}

export const choicesOf = (request: RoutableBody): number =>
  promptBounds(request).length * (request.body.n ?? 1);

/** Undefined: until the context is full. */
const answerTokens = (request: RoutableBody): number | undefined =>
  request.kind === 'chat'
    ? (request.body.max_completion_tokens ?? request.body.max_tokens ?? undefined)
    : (request.body.max_tokens ?? COMPLETION_DEFAULT_TOKENS);

/** One number a prompt. */
function promptBounds(request: RoutableBody): number[] {
  if (request.kind === 'chat') {
    const { messages } = request.body;
    const bytes = messages.reduce((sum, message) => sum + messageBytes(message), 0);
    return [bytes + TEMPLATE_TOKENS + MESSAGE_TOKENS * messages.length];
  }
  const { prompt } = request.body;
  if (typeof prompt === 'string') return [byteLength(prompt) + 1];
  if (typeof prompt[0] === 'number') return [prompt.length];
  return (prompt as (string | number[])[]).map((one) =>
    typeof one === 'string' ? byteLength(one) + 1 : one.length,
  );
}

const messageBytes = (message: ChatMessage): number =>
  byteLength(messageText(message)) + byteLength(message.name ?? '');

/** Of its UTF-8, without making it: 3 a unit at most, exact for ASCII. */
function byteLength(text: string): number {
  let bytes = text.length;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code > 0x7f) bytes += code > 0x7ff ? 2 : 1;
  }
  return bytes;
}

type AdmitParts = RecordParts & {
  readonly budgets: Budgets;
  readonly models: Models;
  readonly completionIds: CompletionIds;
};

type AdmitRequest = {
  readonly caller: Caller;
  readonly routable: RoutableBody;
  readonly patience: Patience;
  readonly signal: AbortSignal;
  readonly hold: Hold;
  /** See `openRecord`. */
  readonly answered: (event: string, routed: Routed) => Promise<void>;
  /** How far the tenant's limits are used, for the client. */
  readonly onLimits: (headers: Record<string, string>) => void;
};

/**
 * `route` runs meanwhile; the record is open when both are done, and closed when either fails.
 * @throws MaskrouteError `model_not_allowed`, what `reserve` throws, and what `route` throws.
 */
export async function admit(
  parts: AdmitParts,
  request: AdmitRequest,
  route: () => Promise<Routed>,
): Promise<{ record: RequestRecord; routed: Routed }> {
  const { caller, routable, patience, signal, hold, answered } = request;
  requireModel(caller.policy, routable.body.model);
  const ids = parts.completionIds.create(caller.tenant);
  const record = openRecord(parts, { ...ids, caller, routable, patience, signal, hold, answered });
  const [reserved, routed] = await Promise.allSettled([
    reserve(parts, request, ids.event, record),
    route().then((decided) => {
      record.routed(decided);
      return decided;
    }),
  ]);
  if (reserved.status === 'rejected') {
    record.refused(reserved.reason);
    throw reserved.reason;
  }
  if (routed.status === 'rejected') {
    record.failed(routed.reason);
    throw routed.reason;
  }
  return { record, routed: routed.value };
}

/** @throws MaskrouteError `model_not_allowed`. */
export function requireModel({ models }: TenantPolicy, name: string): void {
  const { model } = splitModelName(name);
  if (models === null || models.includes(model)) return;
  throw new MaskrouteError('model_not_allowed', `This tenant may not use ${model}.`, { param: 'model' });
}

async function reserve(
  { budgets, models }: AdmitParts,
  { caller, routable, hold, onLimits }: AdmitRequest,
  event: string,
  record: RequestRecord,
): Promise<void> {
  const { tenant, policy } = caller;
  if (isUnlimited(policy.limits)) return;
  const list = await models.list(hold).catch(() => []);
  const { model } = splitModelName(routable.body.model);
  const context = list.find(({ id }) => id === model)?.maskroute?.context_tokens ?? CONTEXT_UNKNOWN_TOKENS;
  const bounds = tokenBounds(routable, context);
  const reserved = await budgets.reserve(tenant, policy.limits, event, bounds);
  if (reserved === null) return;
  onLimits(reserved.headers);
  if (!reserved.granted) throw reserved.error;
  const { reservation } = reserved;
  record.reserved(reservation, answerTokensMax(bounds, reservation.tokens));
}

/** An answer of open length is cut where what was granted ends; any other was granted whole. */
const answerTokensMax = (bounds: TokenBounds, granted_tokens: number): number | undefined =>
  bounds.isOpen && granted_tokens < bounds.wanted_tokens
    ? Math.floor((granted_tokens - bounds.prompt_tokens) / bounds.choices)
    : undefined;
