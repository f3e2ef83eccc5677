/**
 * Sticky assignment: which variant of an experiment a request sees, or which version during a rollout. A hash of the
 * experiment or publication and the request's sticky key decides. The same key always gets the same result, in every
 * isolate and without any state, and shares follow the weights.
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

/** There is at least one variant, and weights are above 0. */
export function assignVariant<V extends { readonly weight: number }>(
  experiment: string,
  variants: readonly V[],
  stickyKey: string,
): V {
  const total = variants.reduce((sum, { weight }) => sum + weight, 0);
  let left = stickyFraction(experiment, stickyKey) * total;
  for (const variant of variants) {
    left -= variant.weight;
    if (left < 0) return variant;
  }
  // Rounded differences can leave a little over.
  return variants.at(-1)!;
}

/* An experiment's scope: which requests take part. */

/** Empty lists do not restrict the scope. */
export type Scope = {
  readonly tenants: readonly string[];
  readonly models: readonly string[];
  readonly regions: readonly Place[];
  readonly startsAt_ms: number;
  /** Infinity: until it is stopped. */
  readonly endsAt_ms: number;
};

/** A place at three levels: a scope names one of them, a request has all that are known. */
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
 * Whether a request could be in both scopes. Places of different kinds count as overlapping, since one may contain the
 * other (it is not known here which country a data centre is in).
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

/* The sticky key, derived from the request: requests with the same key get the same variant and the same version. */

/** The start of the conversation, the body's `user` field, or the API key. */
export const STICKY_KINDS = ['conversation', 'user', 'api_key'] as const;
export type StickyKind = (typeof STICKY_KINDS)[number];

/**
 * Characters of a completion's prompt in the key: the prompt grows at its end during a conversation, so only its
 * beginning is used.
 */
const PROMPT_CHARS = 200;
const PROMPT_TOKENS = 50;
/** Messages in the key: enough to tell conversations apart, without hashing all of a long prompt at every request. */
const MESSAGES = 8;
const MESSAGE_CHARS = 2000;

export type StickySource =
  | { readonly kind: 'chat'; readonly body: Pick<ChatRequest, 'messages' | 'user'> }
  | { readonly kind: 'completion'; readonly body: Pick<CompletionRequest, 'prompt' | 'user'> };

export type StickyCaller = { readonly tenant: string; readonly keyId: string };

/**
 * The key of the given kind; keys of two tenants always differ. Keys by user and by conversation do not depend on the
 * API key. Without a `user` field the conversation is used.
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

/** Everything before the first answer; it stays the same while the conversation grows. */
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
 * A rollout in steps: pure arithmetic on the stored schedule, so that all isolates agree without being notified of
 * steps. A request computes it once and then uses either the old version or the new one throughout.
 */

/** For `duration_s`, `share` of the sticky keys see the new version; after the last step all do. */
export type RolloutStep = { readonly share: number; readonly duration_s: number };

export type Rollout = {
  /** Salt of the hash, so that the first keys differ from publication to publication. */
  readonly id: string;
  readonly activateAt_ms: number;
  /** Steps with rising shares; empty: all keys at once. */
  readonly steps: readonly RolloutStep[];
  /** When the rollout was paused; null: it is not. */
  readonly pausedAt_ms: number | null;
};

/** When all keys see the new version, ms; Infinity while paused before that. */
export function completesAt_ms({ activateAt_ms, steps, pausedAt_ms }: Rollout): number {
  const end_ms = steps.reduce((sum_ms, step) => sum_ms + step.duration_s * 1000, activateAt_ms);
  return pausedAt_ms !== null && pausedAt_ms < end_ms ? Number.POSITIVE_INFINITY : end_ms;
}

/** When the share changes next, ms; null when the rollout is complete or paused. */
export function nextStepAt_ms({ activateAt_ms, steps, pausedAt_ms }: Rollout, now_ms: number): number | null {
  if (pausedAt_ms !== null) return null;
  let at_ms = activateAt_ms;
  for (const { duration_s } of steps) {
    if (now_ms < at_ms) return at_ms;
    at_ms += duration_s * 1000;
  }
  return now_ms < at_ms ? at_ms : null;
}

/** The share of sticky keys that see the new version, 0 to 1. It never falls over time. */
export function shareAt({ activateAt_ms, steps, pausedAt_ms }: Rollout, now_ms: number): number {
  const at_ms = pausedAt_ms === null ? now_ms : Math.min(now_ms, pausedAt_ms);
  if (at_ms < activateAt_ms) return 0;
  let end_ms = activateAt_ms;
  for (const step of steps) {
    end_ms += step.duration_s * 1000;
    if (at_ms < end_ms) return step.share;
  }
  return 1;
}

/** Whether this sticky key sees the new version. Shares only rise, so a key never goes back. */
export function seesNew(rollout: Rollout, stickyKey: string, now_ms: number): boolean {
  const share = shareAt(rollout, now_ms);
  if (share === 0 || share === 1) return share === 1;
  return stickyFraction(rollout.id, stickyKey) < share;
}
