/** The result of an evaluation: the command's JSON line, `evaluation.json`, and what the report shows. */

import { z } from 'zod';
import { headroomSchema } from '../../../shared/mask/held-out.ts';
import { percent } from '../../measure.ts';
import { headroomLines } from '../search/headroom.ts';

/** What `--baselines` chooses from: the static methods and the one learned mask. */
export const BASELINES = [
  'one-mask',
  'shortgpt',
  'sleb',
  'blockpruner',
  'finercut',
  'llm-drop',
  'last-k',
  'random',
] as const;
export type Baseline = (typeof BASELINES)[number];

export const METHODS = ['dense', 'learned', ...BASELINES] as const;
export type Method = (typeof METHODS)[number];

/** The unit that each method removes. */
export const UNITS_OF = {
  shortgpt: 'layers',
  sleb: 'layers',
  'last-k': 'layers',
  blockpruner: 'blocks',
  finercut: 'blocks',
  'llm-drop': 'blocks',
  random: 'blocks',
} as const satisfies Record<Exclude<Baseline, 'one-mask'>, 'layers' | 'blocks'>;
export type StaticMethod = keyof typeof UNITS_OF;

/** Baselines that evaluate the model for many masks. */
export const SEARCHED = ['sleb', 'blockpruner', 'finercut'] as const satisfies StaticMethod[];
/** Baselines that need text to calibrate on. */
export const CALIBRATED = [...SEARCHED, 'shortgpt', 'llm-drop'] as const satisfies StaticMethod[];

export const hasAny = (baselines: readonly Baseline[], some: readonly Baseline[]): boolean =>
  baselines.some((name) => some.includes(name));

const interval = z.tuple([z.number(), z.number()]).nullable();

const kindCounts = z.array(z.strictObject({ kind: z.string(), counts: z.array(z.int()) }));

const figures = z.strictObject({
  rows: z.int(),
  positions: z.int(),
  /** KL(dense ‖ masked), nats, mean over positions. */
  kl: z.number(),
  /** Share of positions with the dense model's top token. */
  agreement: z.number(),
  perplexity: z.number(),
});

const taskFiguresSchema = z.strictObject({
  questions: z.int(),
  /** Accuracy by the sum of log-probabilities, and by that sum divided by characters, as in lm-evaluation-harness. */
  acc: z.number(),
  accNorm: z.number().nullable(),
  accInterval: interval,
  accNormInterval: interval,
  /** Accuracy of guessing. */
  chance: z.number(),
  /** The main figure (accNorm where there is one) above chance, as a share of dense. */
  keptAboveChance: z.number().nullable(),
});
export type TaskFigures = z.infer<typeof taskFiguresSchema>;

const rowSchema = z.strictObject({
  method: z.enum(METHODS),
  /** `count`: the target's number of blocks is out. `time`: as many as make it as fast as the learned set. */
  matched: z.enum(['count', 'time']),
  /** Version of the mask set: the row's own for `learned` and `one-mask`, else the set whose time is matched. */
  maskSet: z.string().nullable(),
  /** Clusters that routing chooses from; they may share masks. */
  clusters: z.int(),
  targetSparsity: z.number(),
  /** Reached: mean over the scored rows. */
  sparsity: z.number(),
  /** Whether surrogates stand in for skipped blocks. */
  surrogate: z.boolean(),
  ...figures.omit({ rows: true, positions: true }).shape,
  msPerToken: z.number(),
  /** The fastest and the slowest round; missing in evaluations by earlier versions. */
  msPerTokenSpread: z.tuple([z.number(), z.number()]).optional(),
  /** Skipped attention and FFN blocks, means over the scored rows. */
  attention: z.number(),
  ffn: z.number(),
  /** Share of a decoded token's weights that are not read. */
  skippedWeightShare: z.number(),
  /** Model evaluations that the search took; null where this command did not search. */
  evaluations: z.int().nullable(),
  rows: z.int(),
  positions: z.int(),
  /** 95 %, by resampling rows. */
  intervals: z.strictObject({ kl: interval, agreement: interval, perplexity: interval }),
  byKind: z.record(z.string(), figures),
  tasks: z.record(z.string(), taskFiguresSchema).optional(),
});
export type EvaluationRow = z.infer<typeof rowSchema>;

const means = { kl: z.number(), agreement: z.number(), perplexity: z.number() };
const pair = z.strictObject({
  calibratedOnAll: z.strictObject(means),
  calibratedOnOne: z.strictObject(means),
});
const subject = { method: z.enum(METHODS), targetSparsity: z.number(), surrogate: z.boolean() };

/** The paper's own checks (`checks/run-checks.ts`). */
const checksSchema = z.strictObject({
  /** How likely the right answers are under each method. */
  recall: z.array(z.strictObject({ ...subject, facts: z.int(), ...means })).optional(),
  clustersByTask: z.array(z.strictObject({ name: z.string(), kinds: kindCounts })).optional(),
  /** FinerCut's order, ever more blocks out. */
  cliff: z.array(z.strictObject({ sparsity: z.number(), ...means })).optional(),
  /** FinerCut calibrated on one kind and on all kinds, each scored on all rows and on rows of that kind. */
  narrow: z
    .strictObject({ kind: z.string(), sparsity: z.number(), general: pair, own: pair.nullable() })
    .optional(),
  /** Generated text, judged by the dense model window by window. */
  longText: z
    .array(
      z.strictObject({
        ...subject,
        windows: z.array(
          z.strictObject({
            from: z.int(),
            to: z.int(),
            perplexity: z.number(),
            newFourGrams: z.number(),
          }),
        ),
      }),
    )
    .optional(),
});
export type Checks = z.infer<typeof checksSchema>;

/** How many rows of the data are scored, and how many are left out for which reason. */
const rowCountsSchema = z.strictObject({
  read: z.int(),
  /** Left out because the same row came before. */
  repeated: z.int(),
  /** Left out because baselines calibrate on their prompts. */
  calibrating: z.int(),
  /** Left out because a mask set was learned on their prompts. */
  learnedOn: z.int(),
  /** Rows that remain; at most `limit` of them are scored. */
  left: z.int(),
});
export type RowCounts = z.infer<typeof rowCountsSchema>;

export const evaluationSchema = z.strictObject({
  rows: z.array(rowSchema),
  /** Static methods at the measured time of each learned row. */
  equalTime: z.array(rowSchema),
  /** What each set of several masks gains over its one mask, and what it could gain. */
  headroom: z.array(headroomSchema.extend({ maskSet: z.string(), name: z.string(), surrogate: z.boolean() })),
  /** Scored rows of each kind by cluster, for each mask set. */
  routing: z.array(
    z.strictObject({
      maskSet: z.string(),
      name: z.string(),
      kinds: kindCounts,
    }),
  ),
  checks: checksSchema.optional(),
  data: rowCountsSchema,
  /** What was left out, and why. */
  notes: z.array(z.string()),
  model: z.string(),
  weights: z.string(),
  threads: z.int(),
  search: z.strictObject({ evaluations: z.int(), positions: z.int() }),
  seed: z.int(),
});
export type Evaluation = z.infer<typeof evaluationSchema>;

/* As aligned text for a terminal. */

export function formatEvaluation({ rows, equalTime, headroom, notes }: Evaluation): string {
  const parts = [`Equal count, ${rows[0]!.rows} rows, ${rows[0]!.positions} positions:`, table(rows)];
  if (equalTime.length > 0) {
    const learned = rows.filter(({ method }) => method === 'learned');
    parts.push(
      '',
      'Equal time (static methods as fast as the learned set):',
      table([...learned, ...equalTime]),
    );
  }
  for (const { name, surrogate, ...found } of headroom)
    parts.push('', `${name}${surrogate ? '' : ', holes'}:`, ...headroomLines(found));
  return [...parts, ...notes].join('\n');
}

/** One line about the rows that were read. */
export function dataLine({ read, repeated, calibrating, learnedOn, left }: RowCounts): string {
  return (
    `of ${read} rows ${repeated} are repeated, ${calibrating} calibrate, ` +
    `${learnedOn} were learned on, and ${left} can be scored`
  );
}

function table(rows: readonly EvaluationRow[]): string {
  const lines = [COLUMNS.map(([title]) => title), ...rows.map((row) => COLUMNS.map(([, cell]) => cell(row)))];
  const widths = COLUMNS.map((_, i) => Math.max(...lines.map((line) => line[i]!.length)));
  return lines
    .map((line) =>
      line
        .map((cell, i) => cell.padEnd(widths[i]!))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

const COLUMNS: readonly (readonly [title: string, cell: (row: EvaluationRow) => string])[] = [
  ['method', ({ method, clusters }) => (clusters > 1 ? `${method} (${clusters})` : method)],
  ['target', ({ targetSparsity }) => percent(targetSparsity)],
  ['out', ({ attention, ffn }) => `${number(attention)}A ${number(ffn)}F`],
  ['surrogates', ({ surrogate }) => (surrogate ? 'yes' : 'no')],
  ['KL', ({ kl, intervals }) => `${kl.toFixed(3)}${plusMinus(intervals.kl)}`],
  ['top-1', ({ agreement }) => percent(agreement)],
  [
    'perplexity',
    ({ perplexity }) => (perplexity < 10_000 ? perplexity.toFixed(1) : perplexity.toExponential(1)),
  ],
  ['ms/token', ({ msPerToken }) => msPerToken.toFixed(2)],
  ['searched', ({ evaluations }) => (evaluations === null ? '' : String(evaluations))],
];

const number = (value: number): string => (Number.isInteger(value) ? String(value) : value.toFixed(1));
const plusMinus = (interval: EvaluationRow['intervals']['kl']): string =>
  interval === null ? '' : ` [${interval.map((value) => value.toFixed(3)).join(', ')}]`;
