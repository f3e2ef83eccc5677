/**
 * Which rows are scored and which calibrate baselines. Each distinct row counts once, the two groups never share a
 * prompt, and no row that a mask set was learned on is scored. Rows are compared by content, not by file: a row that is
 * also in a calibration file, or in a file that a set's record names, is scored only if `learn` held it out (by the
 * same hash).
 */
import { basename } from 'node:path';
import { nearestCentroid, packCentroids } from '../../../shared/mask/centroids.ts';
import { type Mask, maskFromBits } from '../../../shared/mask/mask.ts';
import { type MaskSet, sameEncoder } from '../../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { finishInTurns } from '../../event-loop.ts';
import { createRandom, permutation } from '../../random.ts';
import type { OpenEncoder } from '../data/encoders.ts';
import { type CalibrationRow, distinctRows, divideRows, readData } from '../data/read-data.ts';
import { HELD_OUT_SHARE, isHeldOut } from '../data/samples.ts';
import { dataLine, type RowCounts } from './result.ts';

/** Share of the unseen rows that is scored when there are no calibration files; the others calibrate. */
const SCORED_SHARE = 0.5;

export type EvaluationData = {
  readonly scored: readonly CalibrationRow[];
  readonly calibration: readonly CalibrationRow[];
  /** Rows of `facts` that neither masks nor baselines were made on. */
  readonly facts: readonly CalibrationRow[];
  readonly counts: RowCounts;
};

export type DataOptions = {
  readonly data: readonly string[];
  /** Files to calibrate on; without any, a share of `data` calibrates. */
  readonly calibration: readonly string[];
  readonly facts: readonly string[];
  /** Base names of the files that the mask sets were learned on. */
  readonly learnedOn: readonly string[];
  /** Whether any method needs rows to calibrate on. */
  readonly calibrates: boolean;
  readonly rowsMax?: number | undefined;
  readonly signal?: AbortSignal | undefined;
};

/** @throws MaskrouteError `invalid_data` when a file is unreadable, or nothing is left to score or calibrate on. */
export async function readEvaluationData(options: DataOptions): Promise<EvaluationData> {
  const data = await readFiles(options.data, options);
  const facts = await readFiles(options.facts, options);
  const own = options.calibration.length > 0;
  const given = own ? await readData(options.calibration, options.rowsMax, options.signal) : [];
  const learned = rowsOf([...data, ...facts].filter(({ name }) => options.learnedOn.includes(name)));
  const { signal } = options;
  const rows = await finishInTurns(distinctRows(rowsOf(data)), signal);

  const known = promptsOf([...given, ...learned]);
  const isScored = (row: CalibrationRow) =>
    isHeldOut(row, known.has(row.routeText) ? HELD_OUT_SHARE : own ? 1 : SCORED_SHARE);
  const [scored] = await finishInTurns(divideRows(rows, isScored), signal);
  const calibration = without(own ? given : rows, promptsOf(scored));
  const counts = countRows(rowsOf(data), rows, scored, calibration);
  requireRows(scored, `is left to score: ${dataLine(counts)}`);
  if (options.calibrates) requireRows(calibration, 'is left to calibrate on; name some with --calibration');

  const learnedPrompts = promptsOf(learned);
  const distinctFacts = await finishInTurns(distinctRows(rowsOf(facts)), signal);
  const [unseenFacts] = await finishInTurns(
    divideRows(
      without(distinctFacts, promptsOf(calibration)),
      (row) => !learnedPrompts.has(row.routeText) || isHeldOut(row, HELD_OUT_SHARE),
    ),
    signal,
  );
  if (facts.length > 0)
    requireRows(unseenFacts, 'of --facts is left: all of them calibrate or were learned on');
  return { scored, calibration, facts: unseenFacts, counts };
}

/** Counts the rows of `all` by use. `rows` are its distinct rows; each is scored, calibrates, or was learned on. */
function countRows(
  all: readonly CalibrationRow[],
  rows: readonly CalibrationRow[],
  scored: readonly CalibrationRow[],
  calibration: readonly CalibrationRow[],
): RowCounts {
  const learnedOn = without(without(rows, promptsOf(scored)), promptsOf(calibration)).length;
  return {
    read: all.length,
    repeated: all.length - rows.length,
    calibrating: rows.length - scored.length - learnedOn,
    learnedOn,
    left: scored.length,
  };
}

const promptsOf = (rows: readonly CalibrationRow[]): Set<string> =>
  new Set(rows.map(({ routeText }) => routeText));

const without = (rows: readonly CalibrationRow[], prompts: ReadonlySet<string>): CalibrationRow[] =>
  rows.filter(({ routeText }) => !prompts.has(routeText));

function requireRows(rows: readonly CalibrationRow[], what: string): void {
  if (rows.length === 0) throw new MaskrouteError('invalid_data', `No row ${what}.`);
}

type DataFile = { readonly name: string; readonly rows: readonly CalibrationRow[] };

async function readFiles(
  paths: readonly string[],
  { rowsMax, signal }: Pick<DataOptions, 'rowsMax' | 'signal'>,
): Promise<DataFile[]> {
  const files: DataFile[] = [];
  for (const path of paths)
    files.push({ name: basename(path), rows: await readData([path], rowsMax, signal) });
  return files;
}

const rowsOf = (files: readonly DataFile[]): CalibrationRow[] => files.flatMap(({ rows }) => rows);

/** At most `limit` rows in a random order, equally many of each kind as far as possible. */
export function pickRows(rows: readonly CalibrationRow[], limit: number, seed: number): CalibrationRow[] {
  const shuffled = Array.from(permutation(rows.length, createRandom(seed)), (index) => rows[index]!);
  const byKind = Map.groupBy(shuffled, ({ kind }) => kind);
  const kinds = [...byKind].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, members]) => members);
  const picked: CalibrationRow[] = [];
  for (let turn = 0; picked.length < Math.min(limit, rows.length); turn++) {
    for (const members of kinds) if (members[turn] && picked.length < limit) picked.push(members[turn]!);
  }
  return picked;
}

/* The mask of each row under a mask set, picked as the edge picks it: the set's encoder, the nearest centroid. */

/** The cluster of each text. @throws MaskrouteError `encoder_mismatch` when `open` is not the set's encoder. */
export async function routeTexts(
  set: MaskSet,
  { encoder }: OpenEncoder,
  texts: readonly string[],
  signal?: AbortSignal,
): Promise<number[]> {
  if (!sameEncoder(set.encoder, encoder.spec)) {
    throw new MaskrouteError(
      'encoder_mismatch',
      `The mask set ${set.name} routes by ${set.encoder.id} ${set.encoder.revision}, ` +
        `this encoder is ${encoder.spec.id} ${encoder.spec.revision}; name the set's own with --encoder.`,
    );
  }
  const centroids = packCentroids(set.clusters.map(({ centroid }) => centroid));
  const vectors = await encoder.embed(texts, signal);
  return vectors.map((vector) => nearestCentroid(vector, centroids).cluster);
}

export const clusterMasks = (set: MaskSet): Mask[] =>
  set.clusters.map(({ bits }) => maskFromBits(set.model.blockCount, bits));

/**
 * The mask that was learned on all prompts: the set's only mask when it has one cluster, else from its record.
 * @throws MaskrouteError `invalid_mask_set` when the record (which no schema checks) has bits for another model.
 */
export function oneMask(set: MaskSet): Mask | undefined {
  if (set.clusters.length === 1) return clusterMasks(set)[0]!;
  const bits = set.learned.oneMask;
  if (typeof bits !== 'string') return undefined;
  try {
    return maskFromBits(set.model.blockCount, bits);
  } catch (cause) {
    const reason = `${set.name}: learned.oneMask: ${(cause as Error).message}.`;
    throw new MaskrouteError('invalid_mask_set', reason, { cause });
  }
}
