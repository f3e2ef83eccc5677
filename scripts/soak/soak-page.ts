/** The report of a soak: the checks, and charts over time, in one HTML file without scripts. */
import { quantileSorted } from 'simple-statistics';
import {
  facts,
  figure,
  type Html,
  type PointSeries,
  page,
  plot,
  section,
  table,
} from '../../gpu-backend/learning/report/page.ts';
import type { Outcome } from '../load/clients.ts';
import type { Disturbances } from './disturbances.ts';
import { answersOf, type Check, type MemorySample } from './soak-checks.ts';

type Soak = {
  readonly begunAt_ms: number;
  readonly seconds: number;
  readonly settings: readonly (readonly [name: string, value: string])[];
  readonly outcomes: readonly Outcome[];
  readonly disturbances: Disturbances;
  readonly memory: readonly MemorySample[];
  readonly checks: readonly Check[];
};

const BUCKETS = 60;
const MEMORY_POINTS = 600;

export function soakPage(soak: Soak): string {
  const broken = soak.checks.filter(({ isKept }) => !isKept);
  const answers = answersOf(soak.outcomes).length;
  const minutes = (soak.seconds / 60).toFixed(0);
  const verdict = [
    `${soak.outcomes.length} requests in ${minutes} minutes, ${answers} of them answered whole.`,
    broken.length === 0
      ? 'Everything held that must hold.'
      : `Did not hold: ${broken.map(({ name }) => name.toLowerCase()).join('; ')}.`,
  ];
  return page('Soak', verdict.join(' '), [
    section('What must hold', checksList(soak.checks)),
    section('What was done', facts([...soak.settings, ...eventsOf(soak)])),
    section(
      'Latency',
      figure(
        plot(latency(soak), axes('seconds')),
        'Times of answers to their end, and of the first event of streams. Marks below: what was done to the product.',
      ),
    ),
    section('Rate', figure(plot(rate(soak), axes('a second')), 'Requests by what became of them.')),
    section(
      'Errors',
      errorsTable(soak),
      figure(
        plot(errors(soak), axes('in a span')),
        `Requests without an answer, by code, in spans of ${(soak.seconds / BUCKETS).toFixed(0)} s.`,
      ),
    ),
    section(
      'Memory',
      figure(
        plot(memory(soak), axes('MB')),
        'Resident memory by process. A killed backend is a new process.',
      ),
    ),
  ]);
}

const axes = (y: string) => ({ x: 'minutes', y });

const checksList = (checks: readonly Check[]): Html =>
  facts(
    checks.map(({ name, isKept, detail }) => [name, `${isKept ? 'It held' : 'It did not hold'}. ${detail}`]),
  );

const eventsOf = ({ disturbances: { publications, kills, stalls } }: Soak) =>
  [
    ['publications', `${publications.length}`],
    [
      'backends killed',
      `${kills.length}; back after ${kills.map(({ begunAt_ms, doneAt_ms }) => `${((doneAt_ms - begunAt_ms) / 1000).toFixed(1)} s`).join(', ') || '–'}`,
    ],
    ['D1 stalled', `${stalls.length} times`],
  ] as const;

/** Codes and their counts, the most frequent first. */
export function errorCounts(outcomes: readonly Outcome[]): [code: string, count: number][] {
  const counts = new Map<string, number>();
  for (const { result } of outcomes) {
    if (result.kind === 'error') counts.set(result.code, (counts.get(result.code) ?? 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]);
}

const errorsTable = ({ outcomes }: Soak): Html =>
  table(
    'Requests without an answer',
    ['code', 'requests'],
    errorCounts(outcomes).map(([code, count]) => [code, String(count)]),
  );

/* Charts, over minutes from the beginning. */

/** A point for each span of time. `none`: the value of an empty span; without it, an empty span has no point. */
function inSpans<T>(
  soak: Soak,
  things: readonly T[],
  at_ms: (thing: T) => number,
  value: (some: readonly T[], span_s: number) => number,
  none?: number,
): PointSeries['points'] {
  const span_s = soak.seconds / BUCKETS;
  const bySpan = Map.groupBy(things, (thing) => Math.floor((at_ms(thing) - soak.begunAt_ms) / 1000 / span_s));
  return Array.from({ length: BUCKETS }, (_, span) => span).flatMap((span) => {
    const own = bySpan.get(span);
    const y = own === undefined ? none : value(own, span_s);
    return y === undefined ? [] : [{ x: ((span + 0.5) * span_s) / 60, y }];
  });
}

const line = (name: string, colour: number, points: PointSeries['points']): PointSeries => ({
  name,
  colour,
  joined: true,
  points,
});

/** Disturbances as marks on the axis of time. */
function marks({ begunAt_ms, disturbances: { publications, kills, stalls } }: Soak): PointSeries[] {
  const at = (spans: readonly { readonly begunAt_ms: number }[]) =>
    spans.map((span) => ({ x: (span.begunAt_ms - begunAt_ms) / 60_000, y: 0 }));
  return [
    { name: 'publication', colour: 2, hollow: true, points: at(publications) },
    { name: 'backend killed', colour: 5, points: at(kills) },
    { name: 'D1 stalled', colour: 3, points: at(stalls) },
  ];
}

const ended = ({ endedAt_ms }: Outcome): number => endedAt_ms;

function latency(soak: Soak): PointSeries[] {
  const answers = answersOf(soak.outcomes);
  const streams = answers.filter(({ firstAt_ms, isStream }) => isStream && firstAt_ms !== undefined);
  const quantile = (share: number, took_ms: (outcome: Outcome) => number) => (some: readonly Outcome[]) =>
    quantileSorted(
      some.map(took_ms).sort((a, b) => a - b),
      share,
    ) / 1000;
  const whole_ms = ({ sentAt_ms, endedAt_ms }: Outcome) => endedAt_ms - sentAt_ms;
  const first_ms = ({ sentAt_ms, firstAt_ms }: Outcome) => firstAt_ms! - sentAt_ms;
  return [
    line('whole, median', 0, inSpans(soak, answers, ended, quantile(0.5, whole_ms))),
    line('whole, 95 %', 1, inSpans(soak, answers, ended, quantile(0.95, whole_ms))),
    line('first event, median', 4, inSpans(soak, streams, ended, quantile(0.5, first_ms))),
    ...marks(soak),
  ];
}

function rate(soak: Soak): PointSeries[] {
  const of = (kind: string) => soak.outcomes.filter(({ result }) => result.kind === kind);
  const aSecond = (some: readonly Outcome[], span_s: number) => some.length / span_s;
  return [
    line('whole answers', 0, inSpans(soak, of('answer'), ended, aSecond, 0)),
    line('hang-ups', 7, inSpans(soak, of('hang-up'), ended, aSecond, 0)),
    line('refused or failed', 1, inSpans(soak, of('error'), ended, aSecond, 0)),
    ...marks(soak),
  ];
}

function errors(soak: Soak): PointSeries[] {
  const series = errorCounts(soak.outcomes).map(([code], index) => {
    const own = soak.outcomes.filter(({ result }) => result.kind === 'error' && result.code === code);
    // Marks use colours 2, 3 and 5.
    return line(
      code,
      [0, 1, 4, 6, 7, 8, 9][index % 7]!,
      inSpans(soak, own, ended, (some) => some.length, 0),
    );
  });
  return [...series, ...marks(soak)];
}

function memory(soak: Soak): PointSeries[] {
  const processes = [...Map.groupBy(soak.memory, ({ pid }) => pid).values()];
  // More points than the chart has pixels would only enlarge the file.
  const nth = Math.ceil(soak.seconds / MEMORY_POINTS);
  const series = processes.map((own, index) =>
    line(
      `${own[0]!.name} ${own[0]!.pid}`,
      [0, 1, 4, 6, 7, 8, 9][index % 7]!,
      own.filter((_, at) => at % nth === 0).map(({ at_s, rss_MB }) => ({ x: at_s / 60, y: rss_MB })),
    ),
  );
  return [...series, ...marks(soak)];
}
