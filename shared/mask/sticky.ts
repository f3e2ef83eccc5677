/**
 * Which of several versions a request sees: an experiment's variant, or the old or the new version while a publication
 * takes hold. A hash of the experiment or publication and the request's sticky key decides, never a coin a request: the
 * same key always gets the same answer, in every isolate, with nothing remembered, and shares follow the weights.
 */
import { sha256 } from '@noble/hashes/sha2.js';
import { utf8ToBytes } from '@noble/hashes/utils.js';
import { opening } from '../embedding/encoder.ts';
import { type ChatRequest, type CompletionRequest, messageText } from '../wire/openai.ts';

/** A number in [0, 1) from 48 bits of SHA-256 over `experiment`, a zero byte and `stickyKey`. */
export function stickyFraction(experiment: string, stickyKey: string): number {
  const digest = sha256(utf8ToBytes(`${experiment}\u0000${stickyKey}`));
  let value = 0;
  for (let i = 0; i < 6; i++) value = value * 256 + digest[i]!;
  return value / 2 ** 48;
}

/** @throws RangeError when no variant has a positive weight. */
export function assignVariant<V extends { readonly weight: number }>(
  experiment: string,
  variants: readonly V[],
  stickyKey: string,
): V {
  const total = variants.reduce((sum, variant) => sum + Math.max(0, variant.weight), 0);
  if (!(total > 0)) throw new RangeError(`experiment ${experiment} has no variant with a positive weight`);
  let left = stickyFraction(experiment, stickyKey) * total;
  for (const variant of variants) {
    left -= Math.max(0, variant.weight);
    if (left < 0) return variant;
  }
  return variants.findLast((variant) => variant.weight > 0)!;
}

/* An experiment's scope: which requests take part. */

/** An empty list is no limit. */
export type Scope = {
  readonly tenants: readonly string[];
  readonly models: readonly string[];
  readonly regions: readonly Place[];
  readonly startsAt_ms: number;
  /** Infinity: until it is stopped. */
  readonly endsAt_ms: number;
};

/** A place, known as precisely as it is: a scope names one of the three, a request has all that are known. */
export type Place = {
  readonly continent?: string | undefined;
  readonly country?: string | undefined;
  readonly colo?: string | undefined;
};
const PLACE_KINDS = ['continent', 'country', 'colo'] as const;

type ScopedRequest = { readonly tenant: string; readonly model: string; readonly place: Place };

export const isInScope = (scope: Scope, request: ScopedRequest, now_ms: number): boolean =>
  scope.startsAt_ms <= now_ms &&
  now_ms < scope.endsAt_ms &&
  isListed(scope.tenants, request.tenant) &&
  isListed(scope.models, request.model) &&
  (scope.regions.length === 0 || scope.regions.some((region) => isWithin(request.place, region)));

const isListed = (list: readonly string[], item: string): boolean => list.length === 0 || list.includes(item);

const isWithin = (place: Place, region: Place): boolean =>
  PLACE_KINDS.every((kind) => region[kind] === undefined || region[kind] === place[kind]);

/**
 * Whether one request could be in both. Places of different kinds may hold one another (nothing here knows
 * which country a data centre is in), so they count as overlapping.
 */
export const overlap = (a: Scope, b: Scope): boolean =>
  a.startsAt_ms < b.endsAt_ms &&
  b.startsAt_ms < a.endsAt_ms &&
  share(a.tenants, b.tenants) &&
  share(a.models, b.models) &&
  (a.regions.length === 0 ||
    b.regions.length === 0 ||
    a.regions.some((one) => b.regions.some((other) => mayMeet(one, other))));

const share = (a: readonly string[], b: readonly string[]): boolean =>
  a.length === 0 || b.length === 0 || a.some((item) => b.includes(item));

const mayMeet = (a: Place, b: Place): boolean =>
  PLACE_KINDS.every((kind) => a[kind] === undefined || b[kind] === undefined || a[kind] === b[kind]);

/*
 * The sticky key: what a request is recognised by, so that the next one like it gets the same variant and the same
 * version. It is read off the request.
 */

/** The start of the conversation, the body's `user` field, or the API key. */
export const STICKY_KINDS = ['conversation', 'user', 'api_key'] as const;
export type StickyKind = (typeof STICKY_KINDS)[number];

/** A completion's prompt grows at its end while a conversation goes on, so only its beginning names it. */
const PROMPT_CHARS = 200;
const PROMPT_TOKENS = 50;
/** Enough to tell conversations apart; all of a long prompt would be hashed at every request. */
const MESSAGES = 8;
const MESSAGE_CHARS = 2000;

export type StickySource =
  | { readonly kind: 'chat'; readonly body: Pick<ChatRequest, 'messages' | 'user'> }
  | { readonly kind: 'completion'; readonly body: Pick<CompletionRequest, 'prompt' | 'user'> };

export type StickyCaller = { readonly tenant: string; readonly keyId: string };

/**
 * The key of `kind`; two tenants never share one. A user and a conversation stay what they are when the
 * tenant changes its API key; a request without a `user` field is recognised by its conversation instead.
 */
export function stickyKey(kind: StickyKind, caller: StickyCaller, request: StickySource): string {
  switch (kind) {
    case 'api_key':
      return JSON.stringify(['api_key', caller.keyId]);
    case 'user':
      if (request.body.user == null) return stickyKey('conversation', caller, request);
      return JSON.stringify(['user', caller.tenant, request.body.user]);
    case 'conversation':
      return conversationKey(caller.tenant, request);
  }
}

export const conversationKey = (tenant: string, request: StickySource): string =>
  JSON.stringify(['conversation', tenant, ...conversationStart(request)]);

/** Everything up to the first answer, which stays as it is while the conversation grows. */
function conversationStart(request: StickySource): readonly unknown[] {
  if (request.kind === 'chat') {
    const start = opening(request.body.messages).slice(0, MESSAGES);
    return start.map((message) => [message.role, messageText(message).slice(0, MESSAGE_CHARS)]);
  }
  const { prompt } = request.body;
  if (typeof prompt === 'string') return [prompt.slice(0, PROMPT_CHARS)];
  const [first] = prompt;
  if (typeof first === 'number') return prompt.slice(0, PROMPT_TOKENS);
  return [typeof first === 'string' ? first.slice(0, PROMPT_CHARS) : first!.slice(0, PROMPT_TOKENS)];
}

/*
 * A publication that takes hold in steps: pure arithmetic on its stored schedule, so that all isolates agree and none
 * has to be told when a step begins. A request asks once and keeps the answer: it sees the old version or the new one.
 */

/** `share` of the sticky keys see the new version for `duration_s`; then the next step, at last all of them. */
export type RolloutStep = { readonly share: number; readonly duration_s: number };

export type Rollout = {
  /** Salts the hash, so that it is not the same keys that go first in every publication. */
  readonly id: string;
  readonly activateAt_ms: number;
  /** Shares rise; none: everyone at once. */
  readonly steps: readonly RolloutStep[];
  /** From then on nothing goes on by itself; null: it does. */
  readonly pausedAt_ms?: number | null;
};

/** Infinity while it is paused on its way. */
export function completesAt_ms({ activateAt_ms, steps, pausedAt_ms = null }: Rollout): number {
  const end_ms = steps.reduce((sum_ms, step) => sum_ms + step.duration_s * 1000, activateAt_ms);
  return pausedAt_ms !== null && pausedAt_ms < end_ms ? Number.POSITIVE_INFINITY : end_ms;
}

/** When the share changes next; null when everyone sees it, and while it is paused. */
export function nextStepAt_ms(
  { activateAt_ms, steps, pausedAt_ms = null }: Rollout,
  now_ms: number,
): number | null {
  if (pausedAt_ms !== null) return null;
  let at_ms = activateAt_ms;
  for (const { duration_s } of steps) {
    if (now_ms < at_ms) return at_ms;
    at_ms += duration_s * 1000;
  }
  return now_ms < at_ms ? at_ms : null;
}

/** The share of sticky keys that see the new version, 0 to 1. It never falls as time goes on. */
export function shareAt({ activateAt_ms, steps, pausedAt_ms = null }: Rollout, now_ms: number): number {
  const at_ms = pausedAt_ms === null ? now_ms : Math.min(now_ms, pausedAt_ms);
  if (at_ms < activateAt_ms) return 0;
  let end_ms = activateAt_ms;
  for (const step of steps) {
    end_ms += step.duration_s * 1000;
    if (at_ms < end_ms) return step.share;
  }
  return 1;
}

/** Whether this sticky key sees the new version. Once it does, it goes on to: shares only rise. */
export function seesNew(rollout: Rollout, stickyKey: string, now_ms: number): boolean {
  const share = shareAt(rollout, now_ms);
  if (share === 0 || share === 1) return share === 1;
  return stickyFraction(rollout.id, stickyKey) < share;
}
