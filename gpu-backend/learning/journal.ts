/**
 * Journals of the model's results, which are expensive to compute: one JSON line each, `[name, value]`, written as they
 * come. A run that is started again reads them instead of computing them. Everything else is a function of them, so the
 * run takes the same decisions and ends with the same bytes. A kill loses only the line that was being written.
 *
 * A learning run has its own journal, and its output for itself; evaluations share their results with later ones.
 */
import { createHash } from 'node:crypto';
import { appendFile, mkdir, readFile, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { z } from 'zod';
import { canonicalJson } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { namingFile, removeOldParts, tryLock, writeWhole } from '../files.ts';
import { calibrationIn } from '../model/model-source.ts';
import type { InstalledModel } from '../model/store.ts';
import type { Sample } from './data/samples.ts';

export type Journal<T> = {
  readonly size: number;
  get(name: string): T | undefined;
  /** @throws RangeError for a value that could not be read back, such as NaN. */
  set(name: string, value: T): Promise<void>;
  /**
   * The value under `name`; if there is none, the result of `compute`, which is then written. Concurrent calls for one
   * name compute once.
   */
  result(name: string, compute: () => Promise<T>): Promise<T>;
  /** Deletes the journal: the run is over. */
  remove(): Promise<void>;
};

export type RunJournal = Journal<readonly number[]>;

/**
 * Runs `work`, which writes `output`, under a lock: two runs with the same output would mix their results, or drop each
 * other's. `lockFile`: in the folder `output` unless given.
 * @throws MaskrouteError `conflict` while another run writes it.
 */
export async function withOutput<T>(
  output: string,
  work: () => Promise<T>,
  lockFile = join(output, '.lock'),
): Promise<T> {
  const unlock = tryLock(lockFile);
  if (unlock === undefined) {
    const message = `Another run writes ${output}: wait for its end, or name another place with --out.`;
    throw new MaskrouteError('conflict', message);
  }
  try {
    return await work();
  } finally {
    unlock();
  }
}

const numbers = z.array(z.number());
const headSchema = z.strictObject({ key: z.string() });

/**
 * The journal of one run; only that run writes it. `key`: {@link contentKey} of everything that results depend on, kept
 * in the first line; a journal with another key is started afresh, and `say` receives a line about that. A damaged line
 * and all lines after it are dropped.
 */
export async function openRunJournal(
  path: string,
  key: string,
  say: (line: string) => void,
): Promise<RunJournal> {
  await mkdir(dirname(path), { recursive: true });
  const found = await readRun(path);
  if (found.key !== key && found.known.size > 0)
    say(`The run begins anew: what ${path} has is of a run with other data or flags, and is dropped.`);
  const known = found.key === key ? found.known : new Map<string, readonly number[]>();
  await removeOldParts(path);
  await writeWhole(path, [{ key }, ...known].map(toLine).join(''));
  return journalOf(path, numbers, known);
}

/** What the journal of a run has under `name`, whatever the run's key is. */
export const resultIn = async (path: string, name: string): Promise<readonly number[] | undefined> =>
  (await readRun(path)).known.get(name);

/** A file without a key has no results. */
async function readRun(path: string) {
  // Text after the last newline is an incomplete line.
  const [head, ...lines] = (await readOrNothing(path)).split('\n').slice(0, -1);
  const key = headSchema.safeParse(parsed(head ?? '')).data?.key;
  const known = new Map<string, readonly number[]>();
  for (const line of key === undefined ? [] : lines) {
    const entry = entryOf(line, numbers);
    if (entry === undefined) break;
    known.set(...entry);
  }
  return { key, known };
}

/**
 * Results for one question (model, texts, …), in a file of the home folder named by the question's hash. Several
 * commands may read and write it at once, so lines are only appended. `question`: everything that the results depend
 * on. Lines that do not fit the schema are ignored.
 */
export async function openKeptResults<T>(
  home: string,
  question: unknown,
  schema: z.ZodType<T>,
): Promise<Journal<T>> {
  const path = join(home, 'evaluations', `${contentKey(question).slice(0, 32)}.jsonl`);
  await mkdir(dirname(path), { recursive: true });
  const text = await readOrNothing(path);
  // The next line must not be appended to an incomplete one.
  if (text !== '' && !text.endsWith('\n')) await appendFile(path, '\n');
  const known = new Map<string, T>();
  for (const line of text.split('\n')) {
    const entry = entryOf(line, schema);
    if (entry !== undefined) known.set(...entry);
  }
  return journalOf(path, schema, known);
}

/** SHA-256 of a value's canonical JSON. */
export const contentKey = (content: unknown): string =>
  createHash('sha256').update(canonicalJson(content)).digest('hex');

/** Identifies a model's weights, for a question. Calibrated weights also depend on the text that they were calibrated on. */
export function modelKey({ hash, weights, format, ...calibrated }: WeightsOrigin) {
  const calibration = calibrationIn(calibrated);
  return [hash, weights, format, ...(calibration === undefined ? [] : [calibration])];
}
type WeightsOrigin = { readonly hash: string; readonly weights: string; readonly format: string } & Pick<
  InstalledModel['manifest'],
  'fourBits' | 'columns'
>;

export const sampleKey = (samples: readonly Sample[]) =>
  samples.map(({ tokenIds, scoreFrom }) => [
    scoreFrom,
    Buffer.from(tokenIds.buffer, tokenIds.byteOffset, tokenIds.byteLength).toString('base64'),
  ]);

function journalOf<T>(path: string, schema: z.ZodType<T>, known: Map<string, T>): Journal<T> {
  const set = async (name: string, value: T): Promise<void> => {
    if (!schema.safeParse(value).success) throw new RangeError(`${name} gave ${value}`);
    known.set(name, value);
    await appendFile(path, toLine([name, value])).catch((error: unknown) => {
      throw namingFile(path, error);
    });
  };
  const coming = new Map<string, Promise<T>>();
  const computed = async (name: string, compute: () => Promise<T>): Promise<T> => {
    const value = await compute();
    await set(name, value);
    return value;
  };
  return {
    get size() {
      return known.size;
    },
    get: (name) => known.get(name),
    set,
    async result(name, compute) {
      const before = known.get(name);
      if (before !== undefined) return before;
      const value = coming.get(name) ?? computed(name, compute).finally(() => coming.delete(name));
      coming.set(name, value);
      return await value;
    },
    remove: () => rm(path, { force: true }),
  };
}

const toLine = (value: unknown): string => `${JSON.stringify(value)}\n`;

const lineSchema = z.tuple([z.string(), z.unknown()]);

function entryOf<T>(line: string, schema: z.ZodType<T>): [string, T] | undefined {
  const entry = lineSchema.safeParse(parsed(line));
  const value = schema.safeParse(entry.data?.[1]);
  return entry.success && value.success ? [entry.data[0], value.data] : undefined;
}

function parsed(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return undefined;
  }
}

async function readOrNothing(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return '';
    throw error;
  }
}
