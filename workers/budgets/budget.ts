/**
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
