/** The checks of a soak: pure functions of the clients' outcomes, the edge's books and the disturbances. */
import { linearRegression } from 'simple-statistics';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { type Outcome, REFUSALS, type Result } from '../load/clients.ts';
import type { Disturbances } from './disturbances.ts';

export type Check = {
  readonly name: string;
  readonly isKept: boolean;
  /** Figures, and the first violations. */
  readonly detail: string;
};

type Answer = Outcome & { readonly result: Extract<Result, { kind: 'answer' }> };
export const answersOf = (outcomes: readonly Outcome[]): Answer[] =>
  outcomes.filter((outcome): outcome is Answer => outcome.result.kind === 'answer');

const EXAMPLES = 5;
const examples = (cases: readonly string[]): string =>
  cases.length === 0 ? '' : `: ${cases.slice(0, EXAMPLES).join('; ')}${cases.length > EXAMPLES ? '; …' : ''}`;

/* Books. */

type Tokens = { readonly prompt_tokens: number; readonly completion_tokens: number };

/** A request's event in D1. */
export type CountedEvent = Tokens & {
  readonly request_id: string;
  readonly tenant: string;
  readonly version: string;
  readonly mask: string;
  readonly status: number;
};

export type TenantBooks = Tokens & {
  readonly tenant: string;
  /** Usage in the admin API. */
  readonly requests: number;
  /** Tokens of the day in the budget; null: the tenant has none. */
  readonly budget_tokens: number | null;
};

const sumOf = (events: readonly CountedEvent[], field: keyof Tokens): number =>
  events.reduce((sum, event) => sum + event[field], 0);

/** Checks that usage is the sum of the events, and that the budget has the same tokens. */
export function booksAgree(books: readonly TenantBooks[], events: readonly CountedEvent[]): Check {
  const cases = books.flatMap(({ tenant, budget_tokens, ...usage }) => {
    const own = events.filter((event) => event.tenant === tenant);
    const counted = {
      requests: own.length,
      prompt_tokens: sumOf(own, 'prompt_tokens'),
      completion_tokens: sumOf(own, 'completion_tokens'),
    };
    const tokens = usage.prompt_tokens + usage.completion_tokens;
    const wrong = (['requests', 'prompt_tokens', 'completion_tokens'] as const)
      .filter((field) => usage[field] !== counted[field])
      .map((field) => `${tenant}: usage has ${usage[field]} ${field}, its events ${counted[field]}`);
    const differs = budget_tokens !== null && budget_tokens !== tokens;
    return differs ? [...wrong, `${tenant}: the budget has ${budget_tokens} tokens, usage ${tokens}`] : wrong;
  });
  const total = events.reduce((sum, event) => sum + event.prompt_tokens + event.completion_tokens, 0);
  return {
    name: 'Budgets, usage and events agree to the token',
    isKept: cases.length === 0 && events.length > 0,
    detail: `${events.length} events, ${total} tokens, ${books.length} tenants${examples(cases)}`,
  };
}

/** Checks that each complete answer was counted once, with the tokens, version and mask that the answer reports. */
export function answersAreCounted(answers: readonly Answer[], events: readonly CountedEvent[]): Check {
  const byRequest = new Map<string, CountedEvent[]>();
  for (const event of events) {
    byRequest.set(event.request_id, [...(byRequest.get(event.request_id) ?? []), event]);
  }
  const cases = answers.flatMap(({ tenant, result }) => {
    const own = byRequest.get(result.requestId) ?? [];
    const [event] = own;
    if (event === undefined || own.length > 1) return [`${result.requestId} has ${own.length} events`];
    const { version, mask } = result.said[0];
    const told = { ...result, tenant, version: version === 'none' ? '' : version, mask };
    return (['tenant', 'prompt_tokens', 'completion_tokens', 'version', 'mask'] as const)
      .filter((field) => event[field] !== told[field])
      .map(
        (field) =>
          `${result.requestId}: ${field} ${told[field]} was told, ${event[field]} counted (${event.status})`,
      );
  });
  return {
    name: 'What clients were told is what was counted',
    isKept: cases.length === 0 && answers.length > 0,
    detail: `${answers.length} whole answers${examples(cases)}`,
  };
}

/* Versions. */

/** A publication is seen everywhere within 5 s; one more, as the machine is busy. */
const SEEN_WITHIN_ms = 6_000;

type Seen = { readonly version: string; readonly from_ms: number; readonly until_ms: number };

/** The spans in which requests may get each version of `publisher`. `first`: versions that were live before. */
export function seenSpans(
  { publications, stalls }: Pick<Disturbances, 'publications' | 'stalls'>,
  publisher: string,
  first: readonly string[],
): Seen[] {
  const own = publications
    .filter(({ tenant }) => tenant === publisher)
    .toSorted((a, b) => a.begunAt_ms - b.begunAt_ms);
  const heardBy = (time_ms: number | undefined): number => {
    if (time_ms === undefined) return Number.POSITIVE_INFINITY;
    const heard_ms = time_ms + SEEN_WITHIN_ms;
    // While D1 is stalled, the edge serves the version that it knows.
    const held = stalls.find((stall) => stall.begunAt_ms < heard_ms && stall.doneAt_ms > time_ms);
    return held === undefined ? heard_ms : held.doneAt_ms + SEEN_WITHIN_ms;
  };
  return [
    ...first.map((version) => ({ version, from_ms: 0, until_ms: heardBy(own[0]?.doneAt_ms) })),
    ...own.map(({ version, begunAt_ms }, index) => ({
      version,
      from_ms: begunAt_ms,
      until_ms: heardBy(own[index + 1]?.doneAt_ms),
    })),
  ];
}

/**
 * Checks that each answer reports the same version in its headers and its body, that this version was live during the
 * request, and that the answer's mask is the version's mask for its cluster, or dense. `spansOf`: see {@link seenSpans}.
 */
export function noVersionIsMixed(
  answers: readonly Answer[],
  spansOf: (tenant: string) => readonly Seen[],
  maskSets: ReadonlyMap<string, MaskSet>,
): Check {
  const wrongIn = ({ tenant, sentAt_ms, endedAt_ms, result }: Answer): string | undefined => {
    const [inHeaders, inBody] = result.said;
    const { version, maskSet, cluster, mask } = inHeaders;
    if (JSON.stringify(inHeaders) !== JSON.stringify(inBody)) {
      return `headers say ${Object.values(inHeaders)}, the body ${Object.values(inBody)}`;
    }
    const spans = spansOf(tenant).filter((span) => span.version === version);
    if (!spans.some(({ from_ms, until_ms }) => from_ms <= endedAt_ms && until_ms >= sentAt_ms)) {
      return `${version} was not live for ${tenant} from ${new Date(sentAt_ms).toISOString()} to ${new Date(endedAt_ms).toISOString()}`;
    }
    const set = maskSets.get(version);
    if (set?.name !== maskSet) return `${version} is called ${maskSet}`;
    const own = set.clusters[Number(cluster)]?.mask;
    return own === mask || mask === 'dense' ? undefined : `${version} has ${own} for ${cluster}, not ${mask}`;
  };
  const cases = answers.flatMap((answer) => {
    const wrong = wrongIn(answer);
    return wrong === undefined ? [] : [`${answer.result.requestId}: ${wrong}`];
  });
  const versions = new Set(answers.map(({ result }) => result.said[0].version));
  const dense = answers.filter(({ result }) => result.said[0].mask === 'dense').length;
  return {
    name: 'No version is mixed',
    isKept: cases.length === 0 && versions.size > 1,
    detail: `${versions.size} versions, ${dense} answers ran dense${examples(cases)}`,
  };
}

/* Failures. */

/** Error codes of requests that were at a backend, or on their way to it, when it was killed. */
const OF_A_KILL: readonly string[] = ['backend_error', 'backend_unreachable'];
const AFTER_KILL_ms = 3_000;

/** Checks that each failure is a declared refusal, or happened at a backend that was killed at that time. */
export function failuresAreDeclared(
  outcomes: readonly Outcome[],
  { kills }: Pick<Disturbances, 'kills'>,
): Check {
  const failed = outcomes.flatMap(({ result, ...times }) =>
    result.kind === 'error' && !REFUSALS.includes(result.code) ? [{ ...result, ...times }] : [],
  );
  const cases = failed
    .filter(
      ({ code, sentAt_ms, endedAt_ms }) =>
        !OF_A_KILL.includes(code) ||
        !kills.some((kill) => kill.begunAt_ms <= endedAt_ms && kill.doneAt_ms + AFTER_KILL_ms >= sentAt_ms),
    )
    .map(
      ({ code, requestId, endedAt_ms }) => `${code} ${requestId} at ${new Date(endedAt_ms).toISOString()}`,
    );
  return {
    name: 'Every failure is a declared refusal, or of a backend that was killed',
    isKept: cases.length === 0,
    detail: `${failed.length} failures for ${kills.length} kills, ${cases.length} of them undeclared${examples(cases)}`,
  };
}

/* Memory. */

export type MemorySample = {
  readonly at_s: number;
  readonly pid: number;
  readonly name: string;
  readonly rss_MB: number;
};

/**
 * Time until a process is warm. A backend's memory stops growing when its KV cache is full; workerd's after some 20,000
 * requests (LOG.md), for which it has a third of the time. What grows later counts as a leak.
 */
const WARM_AFTER_s: Record<string, number> = { backend: 120 };
const WARM_AFTER_MIN_s = 60;
const WARM_AFTER_PART = 1 / 3;
const WATCHED_MIN_s = 60;
const GROWTH_MAX = 1.1;
/** Less growth than this is noise of the garbage collector. */
const GROWTH_MAX_MB = 16;

type Growth = { readonly name: string; readonly start_MB: number; readonly end_MB: number };

/** Growth of each warm process, by linear regression. A restarted backend is another process. */
export function growthOf(samples: readonly MemorySample[]): Growth[] {
  const byProcess = Map.groupBy(samples, ({ pid }) => pid);
  return [...byProcess.values()].flatMap((own) => {
    const [{ at_s: begun_s, name }, { at_s: ended_s }] = [own[0]!, own.at(-1)!];
    const warm_s = WARM_AFTER_s[name] ?? Math.max(WARM_AFTER_MIN_s, (ended_s - begun_s) * WARM_AFTER_PART);
    const warm = own.filter(({ at_s }) => at_s >= begun_s + warm_s);
    if (warm.length < 2 || ended_s - begun_s - warm_s < WATCHED_MIN_s) return [];
    const { m, b } = linearRegression(warm.map(({ at_s, rss_MB }) => [at_s, rss_MB]));
    return [{ name, start_MB: m * (begun_s + warm_s) + b, end_MB: m * ended_s + b }];
  });
}

export function memoryIsFlat(samples: readonly MemorySample[]): Check {
  const grown = growthOf(samples);
  const words = grown.map(
    ({ name, start_MB, end_MB }) => `${name} ${start_MB.toFixed(0)} to ${end_MB.toFixed(0)} MB`,
  );
  const isFlat = ({ start_MB, end_MB }: Growth) =>
    end_MB <= start_MB * GROWTH_MAX || end_MB - start_MB <= GROWTH_MAX_MB;
  return {
    name: 'Memory is flat once processes are warm',
    isKept: grown.length > 0 && grown.every(isFlat),
    detail: words.join(', '),
  };
}
