/**
 * Admission of requests: checks the tenant's permissions and reserves tokens from its budget. An admitted request has
 * an account, which `settlement.ts` closes.
 *
 * An open account keeps its request alive (`waitUntil`), and nothing else does: otherwise the runtime drops a request
 * whose client hangs up at once, with all pending work, even before its signal aborts. Kept alive, it sees the signal
 * and ends cleanly.
 */

import type { RequestSource } from '../../shared/admin/requests-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type ChatMessage, type ChatRequest, messageTexts } from '../../shared/wire/openai.ts';
import { splitModelName } from '../../shared/wire/protocol.ts';
import type { Patience } from '../backends/attempt.ts';
import type { RequestTrace } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import type { TenantPolicy } from '../db/tenant-rows.ts';
import type { RoutableBody } from '../routing/decision.ts';
import type { Services } from '../services.ts';
import type { Caller } from '../tenants/api-keys.ts';
import type { Reservation } from '../tenants/budgets.ts';
import { isUnlimited } from '../tenants/ledger.ts';

/** A request: its caller, its body, and its time limit. */
export type Asking = {
  readonly caller: Caller;
  readonly requestId: string;
  readonly source: RequestSource;
  readonly routable: RoutableBody;
  readonly patience: Patience;
  /** Aborts when the client hangs up. */
  readonly signal: AbortSignal;
  readonly hold: Hold;
  /** Ended when the account is closed. */
  readonly trace: RequestTrace;
};

export type Account = Asking & {
  /** The id of the request's event and of its reservation. */
  readonly event: string;
  /** The completion's name at the backend. */
  readonly completion: string;
  readonly started_ms: number;
  /** Null for a tenant without limits. */
  readonly reservation: Reservation | null;
  /** The longest granted answer, in tokens for each choice; undefined: the client's own limit. */
  readonly answerTokensMax: number | undefined;
  /** Stops keeping the request alive once `work` is done. */
  readonly letGo: (work: Promise<void> | undefined) => void;
};

/** `headers`: OpenAI's rate-limit headers for the client. */
type Admission = { readonly headers: Record<string, string> } & (
  | { readonly kind: 'admitted'; readonly account: Account }
  /** Refused; the request is not counted. */
  | { readonly kind: 'refused'; readonly error: unknown }
);

type AdmitParts = Pick<Services, 'budgets' | 'completionIds' | 'models'>;

/** Never rejects. */
export async function admit(parts: AdmitParts, asking: Asking): Promise<Admission> {
  const { tenant } = asking.caller;
  const ids = parts.completionIds.create(tenant);
  const { promise, resolve: letGo } = Promise.withResolvers<void>();
  asking.hold(promise);
  const account = { ...asking, ...ids, started_ms: Date.now(), letGo };
  try {
    const { limits } = asking.caller.policy;
    if (isUnlimited(limits)) {
      return { kind: 'admitted', account: { ...account, ...NO_RESERVATION }, headers: {} };
    }
    const bounds = tokenBounds(asking.routable, await contextTokens(parts, asking));
    const reserved = await parts.budgets.reserve(tenant, limits, ids.event, bounds);
    const { headers } = reserved;
    if (!reserved.granted) {
      letGo(undefined);
      return { kind: 'refused', error: reserved.error, headers };
    }
    const { reservation } = reserved;
    const answerTokensMax = answerTokensMaxOf(bounds, reservation.tokens);
    return { kind: 'admitted', account: { ...account, reservation, answerTokensMax }, headers };
  } catch (error) {
    // The budget object may have made the reservation although its answer was lost; it is then released.
    const isUnsure = error instanceof MaskrouteError && error.code === 'budget_unavailable';
    letGo(isUnsure ? parts.budgets.settle(tenant, ids.event, 0) : undefined);
    return { kind: 'refused', error, headers: {} };
  }
}

const NO_RESERVATION = { reservation: null, answerTokensMax: undefined };

/** @throws MaskrouteError `model_not_allowed`. */
export function requireModel({ models }: TenantPolicy, name: string): void {
  const { model } = splitModelName(name);
  if (models === null || models.includes(model)) return;
  throw new MaskrouteError('model_not_allowed', `This tenant may not use ${model}.`, { param: 'model' });
}

/** An answer of open length is limited to the granted tokens; any other is granted in full. */
const answerTokensMaxOf = (bounds: TokenBounds, granted_tokens: number): number | undefined =>
  bounds.isOpen && granted_tokens < bounds.wanted_tokens
    ? Math.floor((granted_tokens - bounds.prompt_tokens) / bounds.choices)
    : undefined;

/* How many tokens a request can cost at most. The edge has no tokenizer of the model, but a byte-level tokenizer never
 * makes more tokens than there are bytes, and no sequence is longer than the context. */

/** The longest context of the backends that serve the model. */
async function contextTokens({ models }: AdmitParts, { routable, hold }: Asking): Promise<number> {
  const list = await models.list(hold).catch(() => []);
  const { model } = splitModelName(routable.body.model);
  const contexts = list.flatMap(({ id, maskroute }) =>
    id === model ? (maskroute?.context_tokens ?? []) : [],
  );
  return contexts.length === 0 ? CONTEXT_UNKNOWN_TOKENS : Math.max(...contexts);
}

type TokenBounds = {
  readonly prompt_tokens: number;
  /** Tokens with the longest answer that the request allows. */
  readonly wanted_tokens: number;
  /** Least tokens that must be granted; fewer than wanted if the client left the length open. */
  readonly least_tokens: number;
  readonly choices: number;
  /** Whether the client left the answer's length open. */
  readonly isOpen: boolean;
};

/** Most tokens that a chat template adds: markers for each message, and a default system prompt. */
const TEMPLATE_TOKENS = 32;
const MESSAGE_TOKENS = 8;
/** Least tokens of an answer whose length the client left open. */
const OPEN_ANSWER_LEAST_TOKENS = 16;
/** OpenAI's default for the legacy endpoint. */
const COMPLETION_DEFAULT_TOKENS = 16;
/** Assumed context while no backend reports it. */
const CONTEXT_UNKNOWN_TOKENS = 32_768;

export function tokenBounds(request: RoutableBody, context_tokens: number): TokenBounds {
  const prompts = promptBounds(request).map((tokens) => Math.min(tokens, context_tokens));
  const prompt_tokens = prompts.reduce((sum, tokens) => sum + tokens, 0);
  const choices = prompts.length * (request.body.n ?? 1);
  const asked = answerTokens(request);
  const longest = Math.min(asked ?? context_tokens, context_tokens);
  const wanted_tokens = prompt_tokens + choices * longest;
  const isOpen = asked === undefined;
  // The backend would refuse a limit below `min_tokens`, which its client never sent.
  const least = Math.min(longest, Math.max(OPEN_ANSWER_LEAST_TOKENS, request.body.min_tokens ?? 0));
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

/** The longest answer that the client allows; undefined: until the context is full. */
const answerTokens = (request: RoutableBody): number | undefined =>
  request.kind === 'chat'
    ? (request.body.max_completion_tokens ?? request.body.max_tokens ?? undefined)
    : (request.body.max_tokens ?? COMPLETION_DEFAULT_TOKENS);

/** Most tokens of each prompt. */
function promptBounds(request: RoutableBody): number[] {
  if (request.kind === 'chat') {
    const { messages } = request.body;
    const bytes = messages.reduce((sum, message) => sum + messageBytes(message), 0);
    return [bytes + TEMPLATE_TOKENS + MESSAGE_TOKENS * messages.length + toolTokens(request.body)];
  }
  const { prompt } = request.body;
  if (typeof prompt === 'string') return [byteLength(prompt) + 1];
  if (typeof prompt[0] === 'number') return [prompt.length];
  return (prompt as (string | number[])[]).map((one) =>
    typeof one === 'string' ? byteLength(one) + 1 : one.length,
  );
}

const messageBytes = (message: ChatMessage): number =>
  messageTexts(message).reduce((sum, text) => sum + byteLength(text), 0) +
  CALL_TOKENS * ((message.tool_calls ?? []).length + (message.role === 'tool' ? 1 : 0));

/** Most tokens that a template writes around a tool call or its result. */
const CALL_TOKENS = 48;
/** Most tokens of a template's general text about tools, and of extra spaces in their schemas. */
const TOOLS_TOKENS = 512;

function toolTokens({ tools, tool_choice }: ChatRequest): number {
  if (tools == null || tools.length === 0 || tool_choice === 'none') return 0;
  return TOOLS_TOKENS + 2 * byteLength(JSON.stringify(tools));
}

/** Upper bound of the UTF-8 length without encoding: at most 3 bytes for each UTF-16 unit, exact for ASCII. */
function byteLength(text: string): number {
  let bytes = text.length;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code > 0x7f) bytes += code > 0x7ff ? 2 : 1;
  }
  return bytes;
}
