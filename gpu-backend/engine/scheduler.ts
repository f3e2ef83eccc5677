/**
 * Decides what each step computes. It knows requests and token counts and never touches a tensor: `schedule` returns the
 * next step, `update` records the tokens that were computed.
 *
 * Continuous batching with chunked prefill: a step has one token of every request that decodes, and pieces of prompts. As
 * in vLLM v1 there are no separate phases: each step moves a request's computed tokens closer to all its tokens. The size
 * of a piece follows from the time that a step may take (`step-cost.ts`): together with decoding requests, a few times as
 * long as their tokens alone. Late in a long prompt even the smallest piece takes longer. The cuts do not change an answer
 * (`pieceOf`).
 * If not all fit into a step, tenants take turns, and so do the requests of a tenant (bounds in `turns.ts`). Tokens and
 * pieces of prompts have separate turns, so that neither waits for the other.
 *
 * Requests are not grouped by mask: a block's weights are read once for all rows that run it, so one step with the rows of
 * two masks takes less time than two steps with one mask each (measured by `bench batch`).
 *
 * Caches are counted in pages, as they fill. If the next tokens have no room, the newest request is preempted: it gives up
 * its pages, returns to the head of the queue (`queue.ts`), and its tokens are computed again later.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { pagesOf } from './prefix-cache.ts';
import { Queue, queueFull } from './queue.ts';
import type { StepCost, StepLoad } from './step-cost.ts';
import { addLoads, NO_LOAD } from './step-cost.ts';
import { Lane } from './turns.ts';

export type SchedulerLimits = {
  /** Requests that hold a cache at a time. */
  readonly runningMax: number;
  readonly waitingMax: number;
  readonly queueTimeout_ms: number;
  /** Target for the longest step, which is how long a cancellation waits; a slow model may exceed it. */
  readonly stepMax_ms: number;
  /** Most prompt tokens in one step; at least 2. */
  readonly chunkTokens: number;
  /** Size of all caches together, in tokens. */
  readonly cacheTokensMax: number;
};

/** The scheduler's state of a request. */
export type ScheduledRequest = {
  readonly requestId: string;
  readonly tenant: string;
  /** The most tokens that its cache may have to hold: prompt and longest answer. */
  readonly cacheTokens: number;
  /** Prompt tokens, which are computed in pieces; the answer's tokens are computed one by one, or as predicted. */
  readonly promptCount: number;
  /** Whether its prompt's tokens are scored (`echo` with `logprobs`), which costs more than computing them. */
  readonly isScored: boolean;
  readonly arrivedAt_ms: number;
  /** When the answer's first choice was submitted, since the epoch; this request may be a later choice. */
  readonly answerSince_ms: number;
  /** Tokens of prompt and answer so far. */
  tokenCount: number;
  computedCount: number;
  /** Predicted tokens that may be computed together with the answer's last one. */
  draftCount: number;
  /** How often it was preempted. */
  preemptions: number;
};

/** A step's time is charged in turns of this length; a shorter step counts as one turn. */
const TURN_ms = 70;
/** Most turns that a step counts as: after the machine was suspended, one step may seem to have taken hours. */
const STEP_TURNS_MAX = 32;
/**
 * With a large model or a slow machine, a step may take as long as this many steps of one token. With fewer, steps would
 * spend too much of their time on reading the weights.
 */
const STEP_TOKENS_MAX = 4;
/**
 * With pieces of prompts, a step may take this many times as long as with the decoding requests' tokens alone. A lower
 * factor would slow prompts down without shortening the longest steps: late in a long prompt even the smallest piece takes
 * this long.
 */
const BESIDE_PROMPT_MAX = 3.5;
/** The smallest piece of the first prompt in a step, so that a prompt always advances. */
const PIECE_TOKENS_MIN = 8;
/**
 * Most answers of a step whose predicted tokens are computed, too. Like pieces of prompts they need attention nodes of their own,
 * and a run has few of them (`placesOf`).
 */
const DRAFTS_MAX = 2;
/** A scored row, whose logits are read, takes as long as this many other rows. */
const SCORED_ROWS = 2.5;
/** A row of a predicted answer, from which a token is sampled: 1.1 when greedy, up to 2.1 with `top_p`. */
const DRAFTED_ROWS = 1.5;

const ONE_TOKEN: StepLoad = { rows: 1, tokens: 1, keys: 1, pieceKeys: 0, rowKeys: 0 };

export type StepPart = {
  readonly request: ScheduledRequest;
  readonly tokens: number;
  /** A token of an answer, perhaps with predicted ones behind it, or a piece of a prompt. */
  readonly kind: 'token' | 'piece';
  readonly load: StepLoad;
};

/** Whether predicted tokens are computed behind the answer's own. */
export const isDrafted = ({ kind, tokens }: StepPart): boolean => kind === 'token' && tokens > 1;

/** What the next run of the graph computes, if anything, and the requests that were preempted to make room for it. */
export type Step = { readonly parts: readonly StepPart[]; readonly preempted: readonly ScheduledRequest[] };

export class Scheduler {
  readonly #limits: SchedulerLimits;
  readonly #queue: Queue<ScheduledRequest>;
  readonly #running: ScheduledRequest[] = [];
  readonly #prompts = new Lane<ScheduledRequest>();
  readonly #tokens = new Lane<ScheduledRequest>();
  readonly #cost: StepCost;

  constructor(limits: SchedulerLimits, cost: StepCost) {
    for (const [name, value] of Object.entries(limits)) {
      if (!(value > 0)) throw new RangeError(`${name} must be positive, not ${value}`);
    }
    if (limits.chunkTokens < 2) throw new RangeError('a piece of a prompt has two tokens at least');
    this.#limits = limits;
    this.#queue = new Queue(limits.runningMax);
    this.#cost = cost;
  }

  get runningCount(): number {
    return this.#running.length;
  }

  get waitingCount(): number {
    return this.#queue.size;
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
   * Queues a request. If the queue is full, drops the newest request of the tenant with most requests in it.
   * @returns the dropped request, if any.
   * @throws MaskrouteError `queue_full` when the new request itself would be dropped; `context_length_exceeded` when it
   * could never fit.
   */
  add(request: ScheduledRequest): ScheduledRequest | undefined {
    const { waitingMax, cacheTokensMax } = this.#limits;
    if (request.cacheTokens > cacheTokensMax) {
      throw new MaskrouteError(
        'context_length_exceeded',
        `The request needs ${request.cacheTokens} tokens of cache; this server has ${cacheTokensMax}.`,
      );
    }
    this.#queue.add(request);
    this.#admit();
    if (this.#queue.size <= waitingMax) return undefined;
    const displaced = this.#queue.removeNewest();
    if (displaced === request) throw queueFull(waitingMax);
    return displaced;
  }

  /** Removes a running or waiting request and admits others to its room. */
  remove(requestId: string): void {
    this.#queue.remove(requestId);
    const running = this.#running.find((one) => one.requestId === requestId);
    if (running !== undefined) this.#stop(running);
    this.#admit();
  }

  #stop(request: ScheduledRequest): void {
    this.#running.splice(this.#running.indexOf(request), 1);
    if (!this.#prompts.leave(request)) this.#tokens.leave(request);
  }

  /** Removes and returns the requests that waited too long. */
  expire(now_ms: number): ScheduledRequest[] {
    const late = this.#queue.removeOld(now_ms - this.#limits.queueTimeout_ms);
    if (late.length > 0) this.#admit();
    return late;
  }

  /** The next step, or undefined when there is nothing to compute. The requests in it use their turns. */
  schedule(): Step | undefined {
    const preempted = this.#makeRoom();
    if (this.#running.length === 0) return undefined;
    const alone = this.#nextTokens();
    const tokens = this.#prompts.inOrder.length === 0 ? this.#withDrafts(alone) : alone;
    const parts = [...tokens, ...this.#nextPieces(tokens)];
    return parts.length === 0 && preempted.length === 0 ? undefined : { parts, preempted };
  }

  /** Preempts the newest requests until the tokens of the others fit. A single request always fits. */
  #makeRoom(): ScheduledRequest[] {
    const preempted: ScheduledRequest[] = [];
    while (this.pagesUsed > this.pagesTotal) {
      const newest = this.#running.reduce((a, b) => (b.arrivedAt_ms >= a.arrivedAt_ms ? b : a));
      this.#stop(newest);
      newest.computedCount = 0;
      newest.preemptions++;
      this.#queue.addPreempted(newest);
      preempted.push(newest);
    }
    return preempted;
  }

  /** One token each of as many decoding requests as a step has time for. */
  #nextTokens(): StepPart[] {
    const parts: StepPart[] = [];
    let load = NO_LOAD;
    for (const request of this.#tokens.inOrder) {
      // Its next token is not sampled yet.
      if (request.computedCount === request.tokenCount) continue;
      const part = newPart(request, 1, 'token');
      load = addLoads(load, part.load);
      if (parts.length > 0 && this.#cost.ms(load) > this.#stepMax_ms(parts[0]!.load)) break;
      this.#tokens.begin(request);
      parts.push(part);
    }
    return parts;
  }

  /** The same tokens, some with as many predicted ones behind them as there is time left for. */
  #withDrafts(tokens: readonly StepPart[]): readonly StepPart[] {
    let parts = tokens;
    for (const [i, { request }] of tokens.entries()) {
      if (parts.filter(isDrafted).length === DRAFTS_MAX) break;
      if (request.computedCount < request.tokenCount - 1) continue;
      for (let drafted = request.draftCount; drafted > 0; drafted--) {
        const longer = parts.with(i, newPart(request, 1 + drafted, 'token'));
        if (this.#cost.ms(loadOf(longer)) > this.#stepMax_ms(tokens[0]!.load)) continue;
        parts = longer;
        break;
      }
    }
    return parts;
  }

  /** Pieces of prompts, in the time that the step's tokens leave. */
  #nextPieces(tokens: readonly StepPart[]): StepPart[] {
    const { chunkTokens } = this.#limits;
    const base = loadOf(tokens);
    const until_ms =
      tokens.length === 0 ? this.#stepMax_ms(ONE_TOKEN) : BESIDE_PROMPT_MAX * this.#cost.ms(base);
    const parts: StepPart[] = [];
    let load = base;
    let rows = 0;
    for (const request of this.#prompts.inOrder) {
      const ordinary = this.#cost.rowsUntil(until_ms, load, request.computedCount);
      const fits = Math.floor(ordinary / rowWeight(request, 'piece'));
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

  /** Call it after a step for each part that was computed. `tokens`: those that count, not those predicted in vain. */
  update({ request, tokens }: Pick<StepPart, 'request' | 'tokens'>): void {
    request.computedCount += tokens;
    if (isInPrompt(request) || !this.#prompts.leave(request)) return;
    this.#tokens.enter(request);
  }

  /** Call it after every step, failed ones too: charges each request its share of the step's time. */
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

  /** Admits requests in order. If the next one does not fit, no other is admitted: small requests cannot starve a large one. */
  #admit(): void {
    const nextOne = () => this.#queue.next(this.#running);
    for (let next = nextOne(); next !== undefined; next = nextOne()) {
      if (this.#running.length >= this.#limits.runningMax) return;
      if (this.pagesUsed + pagesOf(next.tokenCount) > this.pagesTotal) return;
      this.#queue.takeNext(next, this.#running);
      this.#running.push(next);
      (isInPrompt(next) ? this.#prompts : this.#tokens).enter(next);
    }
  }
}

const isInPrompt = ({ computedCount, promptCount }: ScheduledRequest): boolean => computedCount < promptCount;

/**
 * How many of a prompt's next tokens go into a piece of at most `room` tokens. No cut makes a piece of one row: attention
 * sums a single row in another order, and the cuts must not change the answer.
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
  const rows = tokens * rowWeight(request, kind);
  const load: StepLoad =
    kind === 'token' && tokens === 1
      ? { rows: tokens, tokens, keys, pieceKeys: 0, rowKeys: 0 }
      : { rows, tokens: 0, keys: 0, pieceKeys: keys, rowKeys: tokens * keys };
  return { request, tokens, kind, load };
}

/** How many rows of a prompt each row of a part with several counts as. */
function rowWeight({ isScored }: ScheduledRequest, kind: StepPart['kind']): number {
  if (kind === 'token') return DRAFTED_ROWS;
  return isScored ? SCORED_ROWS : 1;
}

const loadOf = (parts: readonly StepPart[]): StepLoad =>
  parts.map(({ load }) => load).reduce(addLoads, NO_LOAD);
