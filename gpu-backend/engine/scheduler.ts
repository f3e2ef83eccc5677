/**
 * Who runs next. It knows requests and token counts and never touches a tensor: `schedule` says what the next
 * step computes, `update` hears what came of it.
 *
 * A step has one token of every running request that generates, and pieces of prompts beside them. There is no prefill or
 * decode phase (as in vLLM v1): a request has tokens, some of them computed, and every step brings the computed ones
 * closer to all. How large a piece may be follows from what a step may take (`step-cost.ts`): beside answers, a few times as long
 * as their tokens alone. Deep in a prompt the smallest piece takes longer than that.
 * Pieces are cut where time says so: an answer does not depend on it (`pieceOf`).
 * When not everybody fits, tenants take turns, and so do a tenant's requests among themselves (`turns.ts` has the bounds): for tokens
 * and for pieces of prompts apart, so that neither waits for the other.
 *
 * Rows of one mask are not put together: a block's weights are read once for all rows that run it, and a step with the rows of
 * two masks takes less than two steps with one each (measured: `bench batch`).
 *
 * Caches are counted in pages, as they fill. When there is no room for the next tokens, the newest request gives its pages
 * back and waits at the head of the line; its tokens are computed again later.
 *
 * In the waiting line, a tenant's requests go in as they came. Tenants with fewer running requests go first. While a tenant
 * has a place left in its share, at most `runningMax` requests pass its first one, and after them one of each tenant that was
 * passed by as many before.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { pagesOf } from './prefix-cache.ts';
import type { StepCost, StepLoad } from './step-cost.ts';
import { addLoads, NO_LOAD } from './step-cost.ts';
import { Lane } from './turns.ts';

export type SchedulerLimits = {
  /** Requests that hold a cache at a time. */
  readonly runningMax: number;
  readonly waitingMax: number;
  readonly queueTimeout_ms: number;
  /** What a step may take, where the model is so fast: the longest that a cancel waits. */
  readonly stepMax_ms: number;
  /** Tokens of prompts in one step at most, 2 or more. */
  readonly chunkTokens: number;
  /** Room in all caches together, in tokens. */
  readonly cacheTokensMax: number;
};

/** What the scheduler keeps of a request. */
export type ScheduledRequest = {
  readonly requestId: string;
  readonly tenant: string;
  /** The most tokens its cache may come to hold. */
  readonly cacheTokens: number;
  /** Tokens of its prompt: they are computed in pieces, those of its answer one by one. */
  readonly promptCount: number;
  /** Its prompt's tokens are scored, which costs more than computing them. */
  readonly isScored: boolean;
  readonly arrivedAt_ms: number;
  /** When the whole answer began; the request may be a late choice of it. */
  readonly answerSince_ms: number;
  /** Tokens of prompt and answer so far. */
  tokenCount: number;
  computedCount: number;
  /** How often it had to give its pages back. */
  preemptions: number;
};

/** A tenant's share of the running places: whoever comes later finds a place, though a tenant's answers are long. */
export const TENANT_SHARE_MAX = 3 / 4;

/** All that is shorter is one turn as well. */
const TURN_ms = 70;
/** A machine that slept, or stood still, makes nobody wait for ever. */
const STEP_TURNS_MAX = 32;
/**
 * Where a model is large or a machine is slow, a step may take as long as so many steps of one token. Fewer would read the
 * weights too often: a piece of a prompt that takes no longer than reading them wastes half of the time.
 */
const STEP_TOKENS_MAX = 4;
/**
 * How many times as long as with their tokens alone a step of those who generate may take with pieces of prompts. Less would not help
 * them where it takes longest: deep in a prompt, where the smallest piece takes that time. It would only slow the prompt down.
 */
const BESIDE_PROMPT_MAX = 3.5;
/** A prompt goes on, however little time there is. */
const PIECE_TOKENS_MIN = 8;
/** A row whose logits are read for its score takes as long as so many others. */
const SCORED_ROWS = 2.5;

const ONE_TOKEN: StepLoad = { rows: 1, tokens: 1, keys: 1, pieceKeys: 0, rowKeys: 0 };

export type StepPart = {
  readonly request: ScheduledRequest;
  readonly tokens: number;
  /** A token of an answer, or a piece of a prompt. */
  readonly kind: 'token' | 'piece';
  readonly load: StepLoad;
};

/** What the next run of the graph computes, and who gave its pages back before it. */
export type Step = { readonly parts: readonly StepPart[]; readonly preempted: readonly ScheduledRequest[] };

export class Scheduler {
  readonly #limits: SchedulerLimits;
  /** In order of arrival. */
  readonly #waiting: ScheduledRequest[] = [];
  readonly #running: ScheduledRequest[] = [];
  readonly #prompts = new Lane<ScheduledRequest>();
  readonly #tokens = new Lane<ScheduledRequest>();
  readonly #cost: StepCost;
  /** How many later requests of others went past each waiting tenant since its own last request went in. */
  readonly #passedBy = new Map<string, number>();

  constructor(limits: SchedulerLimits, cost: StepCost) {
    for (const [name, value] of Object.entries(limits)) {
      if (!(value > 0)) throw new RangeError(`${name} must be positive, not ${value}`);
    }
    if (limits.chunkTokens < 2) throw new RangeError('a piece of a prompt has two tokens at least');
    this.#limits = limits;
    this.#cost = cost;
  }

  get runningCount(): number {
    return this.#running.length;
  }

  get waitingCount(): number {
    return this.#waiting.length;
  }

  get running(): readonly ScheduledRequest[] {
    return this.#running;
  }

  get pagesUsed(): number {
    return this.#running.reduce((sum, { tokenCount }) => sum + pagesOf(tokenCount), 0);
  }

  get pagesTotal(): number {
    return pagesOf(this.#limits.cacheTokensMax);
  }

  /**
   * In a full line a request takes the place of the newest request of the tenants that have most there, which is
   * returned. @throws MaskrouteError `queue_full` when the newest is this request itself, or `context_length_exceeded` when
   * it could never fit.
   */
  add(request: ScheduledRequest): ScheduledRequest | undefined {
    const { waitingMax, cacheTokensMax } = this.#limits;
    if (request.cacheTokens > cacheTokensMax) {
      throw new MaskrouteError(
        'context_length_exceeded',
        `The request needs ${request.cacheTokens} tokens of cache; this server has ${cacheTokensMax}.`,
      );
    }
    this.#waiting.push(request);
    this.#admit();
    if (this.#waiting.length <= waitingMax) return undefined;
    const displaced = this.#newestOfMost();
    this.#leaveLine(displaced);
    if (displaced === request) throw queueFull(waitingMax);
    return displaced;
  }

  /**
   * Of the tenants with most requests in the line. A choice of an answer that began long ago is no newcomer, though it
   * comes late: else newcomers would keep it out for ever.
   */
  #newestOfMost(): ScheduledRequest {
    // Who ran already is in the line once more and keeps its place.
    const newcomers = this.#waiting.filter(({ preemptions }) => preemptions === 0);
    const counts = countsByTenant(newcomers);
    const most = Math.max(...counts.values());
    return newcomers
      .filter(({ tenant }) => counts.get(tenant) === most)
      .reduce((newest, one) => (one.answerSince_ms >= newest.answerSince_ms ? one : newest));
  }

  /** Takes a request out, wherever it is; room is given on at once. */
  remove(requestId: string): void {
    this.#take(requestId);
    this.#admit();
  }

  #take(requestId: string): void {
    const of = (list: readonly ScheduledRequest[]) => list.findIndex((one) => one.requestId === requestId);
    const place = of(this.#waiting);
    if (place >= 0) this.#leaveLine(this.#waiting[place]!);
    const running = of(this.#running);
    if (running < 0) return;
    this.#stop(this.#running[running]!);
  }

  #stop(request: ScheduledRequest): void {
    this.#running.splice(this.#running.indexOf(request), 1);
    if (!this.#prompts.leave(request)) this.#tokens.leave(request);
  }

  #leaveLine(request: ScheduledRequest): void {
    this.#waiting.splice(this.#waiting.indexOf(request), 1);
    if (!this.#waiting.some(({ tenant }) => tenant === request.tenant)) this.#passedBy.delete(request.tenant);
  }

  /** Requests that waited too long, taken out of the line. */
  expire(now_ms: number): ScheduledRequest[] {
    const late = this.#waiting.filter(
      ({ arrivedAt_ms, preemptions }) =>
        preemptions === 0 && now_ms - arrivedAt_ms > this.#limits.queueTimeout_ms,
    );
    // All of them first: the room that one leaves is for those that stay.
    for (const { requestId } of late) this.#take(requestId);
    if (late.length > 0) this.#admit();
    return late;
  }

  /** The next step, or undefined when nothing runs. It is the turn of those in it from now on. */
  schedule(): Step | undefined {
    const preempted = this.#makeRoom();
    if (this.#running.length === 0) return undefined;
    const tokens = this.#nextTokens();
    const parts = [...tokens, ...this.#nextPieces(tokens)];
    return { parts, preempted };
  }

  /** The newest gives way, until the tokens of all others have room: one alone always has it. */
  #makeRoom(): ScheduledRequest[] {
    const preempted: ScheduledRequest[] = [];
    while (this.pagesUsed > this.pagesTotal) {
      const newest = this.#running.reduce((a, b) => (b.arrivedAt_ms >= a.arrivedAt_ms ? b : a));
      this.#stop(newest);
      newest.computedCount = 0;
      newest.preemptions++;
      this.#waiting.unshift(newest);
      preempted.push(newest);
    }
    return preempted;
  }

  /** One token of each that generates, as many as a step has time for. */
  #nextTokens(): StepPart[] {
    const parts: StepPart[] = [];
    let load = NO_LOAD;
    for (const request of this.#tokens.inOrder) {
      const part = newPart(request, 1, 'token');
      load = addLoads(load, part.load);
      if (parts.length > 0 && this.#cost.ms(load) > this.#stepMax_ms(parts[0]!.load)) break;
      this.#tokens.begin(request);
      parts.push(part);
    }
    return parts;
  }

  /** Pieces of prompts, in the time that those who generate leave. */
  #nextPieces(tokens: readonly StepPart[]): StepPart[] {
    const { chunkTokens } = this.#limits;
    const base = loadOf(tokens);
    const until_ms =
      tokens.length === 0 ? this.#stepMax_ms(ONE_TOKEN) : BESIDE_PROMPT_MAX * this.#cost.ms(base);
    const parts: StepPart[] = [];
    let load = base;
    let rows = 0;
    for (const request of this.#prompts.inOrder) {
      const rowWeight = request.isScored ? SCORED_ROWS : 1;
      const fits = Math.floor(this.#cost.rowsUntil(until_ms, load, request.computedCount) / rowWeight);
      const atLeast = parts.length === 0 ? PIECE_TOKENS_MIN : 0;
      const count = pieceOf(request, Math.min(Math.max(fits, atLeast), chunkTokens - rows));
      if (count === 0) break;
      const part = newPart(request, count, 'piece');
      load = addLoads(load, part.load);
      rows += count;
      this.#prompts.begin(request);
      parts.push(part);
    }
    return parts;
  }

  #stepMax_ms(token: StepLoad): number {
    return Math.max(this.#limits.stepMax_ms, STEP_TOKENS_MAX * this.#cost.ms(token));
  }

  /** After a step: the tokens of a part are computed. */
  update({ request, tokens }: StepPart): void {
    request.computedCount += tokens;
    if (isInPrompt(request) || !this.#prompts.leave(request)) return;
    this.#tokens.enter(request);
  }

  /** After every step, whatever became of it: what each part took of everybody's time. */
  charge({ parts }: Step, took_ms: number): void {
    this.#cost.observe(loadOf(parts), took_ms);
    const shares = parts.map(({ load }) => this.#cost.ms(load));
    const all = shares.reduce((sum, share) => sum + share, 0);
    parts.forEach(({ request, kind }, i) => {
      const turns = Math.round((took_ms * shares[i]!) / all / TURN_ms);
      const lane = kind === 'token' ? this.#tokens : this.#prompts;
      lane.charge(request, Math.min(Math.max(1, turns), STEP_TURNS_MAX));
    });
  }

  /** The next one is waited for when it does not fit: a large request is not overtaken for ever by small ones. */
  #admit(): void {
    for (let next = this.#nextWaiting(); next !== undefined; next = this.#nextWaiting()) {
      if (this.#running.length >= this.#limits.runningMax) return;
      if (this.pagesUsed + pagesOf(next.tokenCount) > this.pagesTotal) return;
      this.#countPassed(next);
      this.#leaveLine(next);
      this.#running.push(next);
      (isInPrompt(next) ? this.#prompts : this.#tokens).enter(next);
    }
  }

  /** A tenant that has its share of places waits for its own requests, and is passed by nobody. */
  #countPassed(next: ScheduledRequest): void {
    const eligible = this.#eligible();
    this.#passedBy.delete(next.tenant);
    for (const tenant of new Set(eligible.map((request) => request.tenant))) {
      if (tenant === next.tenant) continue;
      const passed = (this.#passedBy.get(tenant) ?? 0) + 1;
      // Deleted first: who has waited for longer with so many stands before others.
      if (passed === this.#limits.runningMax) this.#passedBy.delete(tenant);
      this.#passedBy.set(tenant, passed);
    }
  }

  /** Of the line: those whose tenant has a place left in its share. */
  #eligible(): ScheduledRequest[] {
    const running = countsByTenant(this.#running);
    const tenantMax = Math.ceil(TENANT_SHARE_MAX * this.#limits.runningMax);
    return this.#waiting.filter(({ tenant }) => (running.get(tenant) ?? 0) < tenantMax);
  }

  /**
   * Who gave its pages back; then the first request of a tenant that was passed by as many as there are places; else the request that has waited
   * longest, among those of the tenants with fewest requests running.
   */
  #nextWaiting(): ScheduledRequest | undefined {
    const preempted = this.#waiting.find(({ preemptions }) => preemptions > 0);
    if (preempted !== undefined) return preempted;
    const eligible = this.#eligible();
    for (const [tenant, passed] of this.#passedBy) {
      if (passed < this.#limits.runningMax) continue;
      const first = eligible.find((request) => request.tenant === tenant);
      if (first !== undefined) return first;
    }
    const running = countsByTenant(this.#running);
    const count = ({ tenant }: ScheduledRequest) => running.get(tenant) ?? 0;
    const fewest = Math.min(...eligible.map(count));
    return eligible.find((request) => count(request) === fewest);
  }
}

export function countsByTenant(requests: Iterable<{ readonly tenant: string }>): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { tenant } of requests) counts.set(tenant, (counts.get(tenant) ?? 0) + 1);
  return counts;
}

export const queueFull = (waitingMax: number): MaskrouteError =>
  new MaskrouteError('queue_full', `${waitingMax} requests are waiting already.`, { retryAfter_s: 1 });

const isInPrompt = ({ computedCount, promptCount }: ScheduledRequest): boolean => computedCount < promptCount;

/**
 * How many of a prompt's tokens are computed, of `room` at most. Never one of several: attention sums a lone row otherwise than
 * rows together, and where a prompt is cut must not change its answer.
 */
function pieceOf({ computedCount, promptCount }: ScheduledRequest, room: number): number {
  const left = promptCount - computedCount;
  if (left <= room) return left;
  if (room < 2) return 0;
  if (left - room > 1) return room;
  return room > 2 ? room - 1 : left;
}

function newPart(request: ScheduledRequest, tokens: number, kind: StepPart['kind']): StepPart {
  const keys = request.computedCount + tokens;
  const pieceRows = request.isScored ? SCORED_ROWS * tokens : tokens;
  const load: StepLoad =
    kind === 'token'
      ? { rows: tokens, tokens, keys, pieceKeys: 0, rowKeys: 0 }
      : { rows: pieceRows, tokens: 0, keys: 0, pieceKeys: keys, rowKeys: tokens * keys };
  return { request, tokens, kind, load };
}

const loadOf = (parts: readonly StepPart[]): StepLoad =>
  parts.map(({ load }) => load).reduce(addLoads, NO_LOAD);
