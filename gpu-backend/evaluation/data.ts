/**
 * What is scored and what baselines may calibrate on. The two never share a prompt, and nothing that the mask set was
 * learned on is scored: of files in its record only the share counts that `learn` held out (by the same hash).
 */
import { basename } from 'node:path';
import { MaskrouteError } from '../../shared/errors.ts';
import { permutation, seededRandom } from '../calibration/random.ts';
import type { CalibrationRow } from '../calibration/read-data.ts';
import { readData } from '../calibration/read-data.ts';
import { HELD_OUT_SHARE, splitRows } from '../calibration/split.ts';

/** Of files that nobody learned on. */
const SCORED_SHARE = 0.5;

export type EvaluationData = {
  readonly scored: readonly CalibrationRow[];
  readonly calibration: readonly CalibrationRow[];
};

export type DataOptions = {
  readonly data: readonly string[];
  /** Without files, what is left of `data` calibrates. */
  readonly calibration: readonly string[];
  /** Base names of the files that the mask sets were learned on. */
  readonly learnedOn: readonly string[];
  readonly rowsMax?: number | undefined;
};

/** @throws MaskrouteError `invalid_data` when a file is unreadable, or nothing is left to score or calibrate on. */
export async function readEvaluationData(options: DataOptions): Promise<EvaluationData> {
  const own = options.calibration.length > 0;
  const calibration = own ? (await readData(options.calibration, options.rowsMax)).rows : [];
  const known = new Set(calibration.map((row) => row.routeText));
  const scored: CalibrationRow[] = [];
  for (const path of options.data) {
    const { rows } = await readData([path], options.rowsMax);
    const learnedOn = options.learnedOn.includes(basename(path));
    const share = learnedOn ? HELD_OUT_SHARE : own ? 1 : SCORED_SHARE;
    const { fit, heldOut } = splitRows(rows, share);
    scored.push(...heldOut.filter((row) => !known.has(row.routeText)));
    if (!own) calibration.push(...fit);
  }
  if (scored.length === 0)
    throw new MaskrouteError('invalid_data', 'No row is left to score: all of them calibrate.');
  if (calibration.length === 0)
    throw new MaskrouteError('invalid_data', 'No row is left to calibrate on; name some with --calibration.');
  return { scored, calibration };
}

/** At most `limit` rows, equally many of each kind as far as there are, in a random order. */
export function pickRows(rows: readonly CalibrationRow[], limit: number, seed: number): CalibrationRow[] {
  const random = seededRandom(seed);
  const byKind = new Map<string, CalibrationRow[]>();
  for (const index of permutation(rows.length, random)) {
    const row = rows[index]!;
    byKind.set(row.kind, [...(byKind.get(row.kind) ?? []), row]);
  }
  const kinds = [...byKind].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, members]) => members);
  const picked: CalibrationRow[] = [];
  for (let turn = 0; picked.length < Math.min(limit, rows.length); turn++) {
    for (const members of kinds) if (members[turn] && picked.length < limit) picked.push(members[turn]!);
  }
  return picked;
}
