/** Reads all input files of an evaluation first, so that a bad file is reported before hours of work. */
import { basename } from 'node:path';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { InstalledModel } from '../../model/store.ts';
import type { EvaluateOptions } from './evaluation-context.ts';
import { CALIBRATED, hasAny } from './result.ts';
import { type EvaluationData, oneMask, readEvaluationData } from './scored-rows.ts';
import { readTask } from './tasks/read-task.ts';
import type { LoadedTask } from './tasks/run-tasks.ts';

export type Inputs = {
  readonly data: EvaluationData;
  readonly tasks: readonly LoadedTask[];
  readonly notes: readonly string[];
};

/** Most file names that a note lists. */
const NAMES_MAX = 4;

/** @throws MaskrouteError `invalid_mask_set` for a set of another model, `invalid_data`, `invalid_argument`. */
export async function readInputs(options: EvaluateOptions): Promise<Inputs> {
  const { maskSets, baselines } = options.compared;
  checkMaskSets(maskSets, options.evaluated.model);
  const data = await readEvaluationData({
    ...options.rows,
    signal: options.signal,
    facts: options.checks?.facts ?? [],
    learnedOn: maskSets.flatMap(learnedOn),
    calibrates: hasAny(baselines, CALIBRATED),
  });
  options.onRows(data.counts);
  return { data, tasks: await readTasks(options), notes: unknownRows(options) };
}

/** @throws MaskrouteError `invalid_mask_set` for a set of another model, or with a record that holds no valid mask. */
export function checkMaskSets(sets: readonly MaskSet[], model: Pick<InstalledModel, 'manifest'>): void {
  for (const set of sets) {
    checkModel(set, model);
    oneMask(set);
  }
}

/** @throws MaskrouteError `invalid_mask_set`. */
function checkModel({ name, model }: MaskSet, { manifest }: Pick<InstalledModel, 'manifest'>): void {
  const blockCount = 2 * manifest.config.layerCount;
  if (model.hash === manifest.hash && model.blockCount === blockCount) return;
  throw new MaskrouteError('invalid_mask_set', `The mask set ${name} is for ${otherModel(model, manifest)}.`);
}

/** Says which model a set is for; models of the same name are told apart by their hashes. */
function otherModel(
  { name, hash, blockCount }: MaskSet['model'],
  installed: InstalledModel['manifest'],
): string {
  if (hash === installed.hash)
    return `${blockCount} blocks, and ${name} has ${2 * installed.config.layerCount}`;
  if (name !== installed.name) return `another model (${name}), not for ${installed.name}`;
  return `another ${name} (SHA-256 ${hash.slice(0, 12)}…) than the installed one (${installed.hash.slice(0, 12)}…)`;
}

async function readTasks({ tasks }: EvaluateOptions): Promise<LoadedTask[]> {
  if (tasks === undefined) return [];
  const loaded: LoadedTask[] = [];
  for (const file of tasks.files) {
    if (loaded.some(({ task }) => task === file.task))
      throw new MaskrouteError(
        'invalid_argument',
        `--tasks names two files of ${file.task}; one is answered.`,
      );
    loaded.push({ task: file.task, questions: await readTask(file, tasks.limit) });
  }
  return loaded;
}

/** Base names of the files that the set was learned on, from its record. */
const learnedOn = ({ learned }: MaskSet): string[] =>
  Array.isArray(learned.data) ? learned.data.filter((name): name is string => typeof name === 'string') : [];

/**
 * Notes the files that sets were learned on but that were not given: their rows cannot be recognised in other files.
 */
function unknownRows({ compared, rows }: EvaluateOptions): string[] {
  const given = [...rows.data, ...rows.calibration].map((path) => basename(path));
  const missing = [...new Set(compared.maskSets.flatMap(learnedOn))].filter((name) => !given.includes(name));
  if (missing.length === 0) return [];
  const names = missing.slice(0, NAMES_MAX).join(', ');
  const more = missing.length > NAMES_MAX ? ` and ${missing.length - NAMES_MAX} more` : '';
  return [
    `Masks were learned on ${names}${more}, not given here: their rows, if the data has them under another ` +
      'name, count as unseen. --calibration makes them known.',
  ];
}
