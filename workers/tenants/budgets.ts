/**
 * A tenant's limits: its budget, and its burst limit. A request reserves tokens before it runs and settles afterwards.
 * One Durable Object for each tenant keeps the accounts. It exists once in the world and runs one request at a time,
 * which makes budgets exact. When it can't be reached, the request is refused.
 */
import { DurableObject } from 'cloudflare:workers';
import { LRUCache } from 'lru-cache';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { notNow, withDeadline } from '../base/waiting.ts';
import type { BudgetLimits } from '../db/tenant-rows.ts';
import { BUDGET, BURST, RETRIED_AFTER_MAX_s } from '../limits.ts';
import { BUDGET_UNITS, type BudgetState, Ledger, type ReserveAnswer, type ReserveRequest } from './ledger.ts';

/** What a request may cost, see `ReserveRequest`. */
type Bounds = Pick<ReserveRequest, 'wanted_tokens' | 'least_tokens'> & { readonly prompt_tokens: number };

export type Reservation = {
  readonly tokens: number;
  /** The prompt's part of the reservation. */
  readonly prompt_tokens: number;
};

/** The result of a reservation, with OpenAI's rate-limit headers. */
type Reserved = { readonly headers: Record<string, string> } & (
  | { readonly granted: true; readonly reservation: Reservation }
  /** `budget_exceeded` */
  | { readonly granted: false; readonly error: MaskrouteError }
);

export interface Budgets {
  /** Reserves tokens; only for tenants with limits. @throws MaskrouteError `budget_unavailable`. */
  reserve(tenant: string, limits: BudgetLimits, id: string, bounds: Bounds): Promise<Reserved>;
  /** Never throws: a reservation that cannot be settled stays. */
  settle(tenant: string, id: string, tokens: number): Promise<void>;
  /** @throws MaskrouteError `budget_unavailable`. */
  states(tenant: string, limits: BudgetLimits): Promise<BudgetState[]>;
}

export function createBudgets(
  objects: Pick<DurableObjectNamespace<TenantBudget>, 'idFromName' | 'get'>,
): Budgets {
  /** A broken stub stays broken, so each attempt gets a new one. Calls are idempotent, so they can be retried. */
  const ask = async <T>(
    tenant: string,
    question: (object: DurableObjectStub<TenantBudget>) => Promise<T>,
  ) => {
    for (let tries = 1; ; tries++) {
      try {
        const object = objects.get(objects.idFromName(tenant));
        return await withDeadline(question(object), BUDGET.wait_ms, 'the budget');
      } catch (error) {
        log('warn', 'budget_unreachable', { tenant, tries, reason: reasonOf(error) });
        if (tries < BUDGET.tries) continue;
        throw notNow('budget_unavailable', 'The budget cannot be checked right now.', error);
      }
    }
  };
  return {
    async reserve(tenant, limits, id, { prompt_tokens, wanted_tokens, least_tokens }) {
      const request = { id, limits, wanted_tokens, least_tokens };
      const answer = await ask(tenant, async (object) => (await object.reserve(request)) as ReserveAnswer);
      const headers = rateLimitHeaders(answer.states);
      if (!answer.granted) return { granted: false, error: exceeded(answer, least_tokens), headers };
      const { tokens } = answer;
      const reservation = { tokens, prompt_tokens: Math.min(prompt_tokens, tokens) };
      return { granted: true, reservation, headers };
    },
    async settle(tenant, id, tokens) {
      await ask(tenant, (object) => object.settle(id, tokens)).catch((error) => {
        log('error', 'budget_not_settled', { tenant, id, tokens, reason: reasonOf(error) });
      });
    },
    states: (tenant, limits) => ask(tenant, async (object) => (await object.states(limits)) as BudgetState[]),
  };
}

/** It needs no alarm: expired rows are deleted before the next answer. */
export class TenantBudget extends DurableObject {
  readonly #ledger: Ledger;

  constructor(state: DurableObjectState, env: unknown) {
    super(state, env as never);
    this.#ledger = new Ledger(state.storage.sql);
  }

  reserve(request: ReserveRequest): ReserveAnswer {
    return this.ctx.storage.transactionSync(() => this.#ledger.reserve(request, Date.now()));
  }

  settle(id: string, tokens: number): void {
    this.ctx.storage.transactionSync(() => this.#ledger.settle(id, tokens, Date.now()));
  }

  states(limits: BudgetLimits): BudgetState[] {
    return this.ctx.storage.transactionSync(() => this.#ledger.states(limits, Date.now()));
  }
}

function exceeded(refusal: Extract<ReserveAnswer, { granted: false }>, tokens: number): MaskrouteError {
  const { unit, window, limit, used, resetsAfter_ms } = refusal.refusedBy;
  const need = unit === 'tokens' ? `, and this request may take ${tokens}` : '';
  const budget = `The budget of ${limit} ${unit} a ${window}`;
  if (!refusal.everFits) {
    const advice = 'send a shorter prompt or a smaller max_tokens';
    return new MaskrouteError('budget_exceeded', `${budget} never has room for ${tokens} tokens: ${advice}.`);
  }
  const wait_s = Math.max(1, Math.ceil(resetsAfter_ms / 1000));
  return new MaskrouteError('budget_exceeded', `${budget} is used up: ${used} are used or reserved${need}.`, {
    // A minute's budget has room after 61 s at the latest. A client that comes too early is told to wait for the rest.
    retryAfter_s: window === 'minute' ? Math.min(wait_s, RETRIED_AFTER_MAX_s) : wait_s,
  });
}

/** OpenAI's rate-limit headers: for each unit the window with the least remaining. */
function rateLimitHeaders(states: readonly BudgetState[]): Record<string, string> {
  const headers: Record<string, string> = {};
  for (const unit of BUDGET_UNITS) {
    const [least] = states
      .filter((state) => state.unit === unit)
      .sort((a, b) => a.limit - a.used - (b.limit - b.used));
    if (least === undefined) continue;
    headers[`x-ratelimit-limit-${unit}`] = String(least.limit);
    headers[`x-ratelimit-remaining-${unit}`] = String(Math.max(0, least.limit - least.used));
    headers[`x-ratelimit-reset-${unit}`] = `${Math.ceil(least.resetsAfter_ms / 1000)}s`;
  }
  return headers;
}

/*
 * A burst limit for every caller, with or without a budget, so that none can overload the edge. The platform counts,
 * separately in each location and not exactly.
 */

export interface BurstLimit {
  /** @throws MaskrouteError `rate_limit_exceeded`. */
  enter(who: string): Promise<void>;
}

/** Requests of one caller that this isolate has admitted, plus a random start. */
type Seen = { count: number; refused: boolean };

/**
 * `binding` is called once for `askedEvery` requests, so its limit counts that many at a time. After a refusal it is
 * called for every request of that caller. The first call of an isolate comes at a random request: if it always came at
 * the first, a caller with few requests in many isolates would be overcounted. Without a binding, or if it fails,
 * everybody is admitted: it only limits bursts; hard limits are budgets.
 */
export function createBurstLimit(
  binding: Pick<RateLimit, 'limit'> | undefined,
  what: string,
  askedEvery: number,
  random: () => number = Math.random,
): BurstLimit {
  const seen = new LRUCache<string, Seen>({ max: BURST.callersMax });

  const seenOf = (who: string): Seen => {
    const known = seen.get(who);
    if (known !== undefined) return known;
    const first = { count: Math.floor(random() * askedEvery), refused: false };
    seen.set(who, first);
    return first;
  };

  const ask = async (limiter: Pick<RateLimit, 'limit'>, who: string, of: Seen): Promise<void> => {
    const { success } = await limiter.limit({ key: who }).catch((error: unknown) => {
      log('warn', 'burst_limit_unreachable', { who, reason: reasonOf(error) });
      return { success: true };
    });
    if (!success && !of.refused) log('warn', 'burst_refused', { who });
    of.refused = !success;
    if (success) return;
    throw new MaskrouteError('rate_limit_exceeded', `${what} at once: wait ${BURST.window_s} s.`, {
      retryAfter_s: BURST.window_s,
    });
  };

  return {
    async enter(who) {
      if (binding === undefined) return;
      const of = seenOf(who);
      const isDue = ++of.count % askedEvery === 0;
      if (isDue || of.refused) await ask(binding, who, of);
    },
  };
}
