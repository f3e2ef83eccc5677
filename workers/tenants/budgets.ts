/**
 * Tenants' budgets, from the side of a request: reserve before, settle after. The books are kept by one Durable
 * Object a tenant; when it can't be reached nobody knows what is left, and the request is refused.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/log.ts';
import { withDeadline } from '../base/waiting.ts';
import { BUDGET, RETRY_AFTER_s } from '../limits.ts';
import type { TenantBudget } from './tenant-budget.ts';

/*
 * A tenant's budget, as the edge and the tenant's ledger speak of it. A minute is any sixty seconds, so that no more
 * than its limit passes in them wherever they begin; a day is one of UTC, as bills are.
 */

/** Null: no limit. Every limit is a whole number of at least 1. */
export type BudgetLimits = {
  readonly requestsPerMinute: number | null;
  readonly tokensPerMinute: number | null;
  readonly requestsPerDay: number | null;
  readonly tokensPerDay: number | null;
};

export const NO_LIMITS: BudgetLimits = {
  requestsPerMinute: null,
  tokensPerMinute: null,
  requestsPerDay: null,
  tokensPerDay: null,
};

export const isUnlimited = (limits: BudgetLimits): boolean =>
  Object.values(limits).every((limit) => limit === null);

export const BUDGET_UNITS = ['requests', 'tokens'] as const;
export type BudgetUnit = (typeof BUDGET_UNITS)[number];
export const BUDGET_WINDOWS = ['minute', 'day'] as const;
export type BudgetWindow = (typeof BUDGET_WINDOWS)[number];

/**
 * A minute is counted by the second, and one that has only partly left it counts whole: a limit is never passed, and
 * what was used comes back up to a second late.
 */
export const BUCKET_ms = 1_000;

export const WINDOW_ms: Record<BudgetWindow, number> = { minute: 60_000, day: 86_400_000 };

export const limitOf = (limits: BudgetLimits, unit: BudgetUnit, window: BudgetWindow): number | null => {
  switch (unit) {
    case 'requests':
      return window === 'minute' ? limits.requestsPerMinute : limits.requestsPerDay;
    case 'tokens':
      return window === 'minute' ? limits.tokensPerMinute : limits.tokensPerDay;
  }
};

/** One limit and how far it is used. */
export type BudgetState = {
  readonly unit: BudgetUnit;
  readonly window: BudgetWindow;
  readonly limit: number;
  readonly used: number;
  /** Until nothing of it is used, if nothing is asked meanwhile; in a refusal: until there is room. */
  readonly resetsAfter_ms: number;
};

export type ReserveRequest = {
  /** Names the reservation: the same id again gives the same reservation, not a second one. */
  readonly id: string;
  readonly limits: BudgetLimits;
  /** Prompt and answer at their longest. */
  readonly wanted_tokens: number;
  /** Fewer than this are no use to the caller; equal to `wanted_tokens` when the answer may not be cut. */
  readonly least_tokens: number;
};

export type ReserveAnswer =
  | { readonly granted: true; readonly tokens: number; readonly states: readonly BudgetState[] }
  | {
      readonly granted: false;
      readonly refusedBy: BudgetState;
      /** False: it would not fit into an unused window either, so asking again is no use. */
      readonly everFits: boolean;
      readonly states: readonly BudgetState[];
    };

/** How many tokens a request can cost at most, told before it runs. */
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

export type Reservation = {
  readonly tokens: number;
  /** The prompt's part. */
  readonly prompt_tokens: number;
};

/** `headers` tell the client how far its limits are used. */
export type Reserved = { readonly headers: Record<string, string> } & (
  | ({ readonly granted: true } & Reservation)
  /** `error`: `budget_exceeded`. */
  | { readonly granted: false; readonly error: MaskrouteError }
);

export interface Budgets {
  /** @throws MaskrouteError `budget_unavailable`. */
  reserve(tenant: string, limits: BudgetLimits, id: string, bounds: TokenBounds): Promise<Reserved>;
  /** Never throws: what could not be settled stays reserved. */
  settle(tenant: string, id: string, tokens: number): Promise<void>;
  /** @throws MaskrouteError `budget_unavailable`. */
  states(tenant: string, limits: BudgetLimits): Promise<BudgetState[]>;
}

export function createBudgets(
  objects: Pick<DurableObjectNamespace<TenantBudget>, 'idFromName' | 'get'>,
): Budgets {
  /** A broken stub stays broken, so each try has its own. What is asked is idempotent, so it may be asked again. */
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
        if (tries >= BUDGET.tries) throw unavailable(error);
      }
    }
  };
  return {
    async reserve(tenant, limits, id, bounds) {
      const { prompt_tokens, wanted_tokens, least_tokens } = bounds;
      const request = { id, limits, wanted_tokens, least_tokens };
      const answer = await ask(tenant, async (object) => (await object.reserve(request)) as ReserveAnswer);
      const headers = rateLimitHeaders(answer.states);
      if (!answer.granted) return { granted: false, error: exceeded(answer, least_tokens), headers };
      const { tokens } = answer;
      return { granted: true, tokens, prompt_tokens: Math.min(prompt_tokens, tokens), headers };
    },
    async settle(tenant, id, tokens) {
      await ask(tenant, (object) => object.settle(id, tokens)).catch((error) => {
        log('error', 'budget_not_settled', { tenant, id, tokens, reason: reasonOf(error) });
      });
    },
    states: (tenant, limits) => ask(tenant, async (object) => (await object.states(limits)) as BudgetState[]),
  };
}

const unavailable = (cause: unknown) =>
  new MaskrouteError('budget_unavailable', 'The budget cannot be checked right now.', {
    retryAfter_s: RETRY_AFTER_s,
    cause,
  });

function exceeded(refusal: Extract<ReserveAnswer, { granted: false }>, tokens: number): MaskrouteError {
  const { unit, window, limit, used, resetsAfter_ms } = refusal.refusedBy;
  const need = unit === 'tokens' ? `, and this request may take ${tokens}` : '';
  const budget = `The budget of ${limit} ${unit} a ${window}`;
  if (!refusal.everFits) {
    const advice = 'send a shorter prompt or a smaller max_tokens';
    return new MaskrouteError('budget_exceeded', `${budget} never has room for ${tokens} tokens: ${advice}.`);
  }
  return new MaskrouteError('budget_exceeded', `${budget} is used up: ${used} are used or reserved${need}.`, {
    retryAfter_s: Math.max(1, Math.ceil(resetsAfter_ms / 1000)),
  });
}

/** OpenAI's headers, a unit each about the window with the least left. */
function rateLimitHeaders(states: readonly BudgetState[]): Record<string, string> {
  const headers: Record<string, string> = {};
  for (const unit of ['requests', 'tokens'] satisfies BudgetUnit[]) {
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
