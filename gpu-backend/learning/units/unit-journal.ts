/**
 * The results of units: one file for each in a folder that the run and all workers share. It is the source of truth of
 * a run on several machines; the queue only has the units that are still to be computed. An entry holds a hash of its
 * name and content, so a damaged entry is recognised and its unit computed again.
 */
import { randomUUID } from 'node:crypto';
import { mkdir, readdir, readFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { z } from 'zod';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { createWhole, makeFolder, readOwnJson, removeAllOldParts, writeWhole } from '../../files.ts';
import { contentKey } from '../journal.ts';

export type UnitJournal = {
  /** Id of the folder, wherever it is mounted: a worker that reads another id has another folder. */
  readonly id: string;
  /** `undefined` where there is no entry, or a damaged one. */
  read(name: string): Promise<readonly number[] | undefined>;
  /** @throws RangeError for numbers that could not be read back, such as NaN. */
  write(name: string, values: readonly number[]): Promise<void>;
};

const HEAD_FILE = 'journal.json';
/** The first two digits of the names of its entries. */
const ENTRY_FOLDER = /^[0-9a-f]{2}$/;
const headSchema = z.object({ id: z.uuid() });
/**
 * How often and at what interval to look for the id: another machine may be writing it, and file systems may show it
 * late or incomplete.
 */
const [HEAD_LOOKS, HEAD_LOOK_ms] = [20, 100];
const entrySchema = z.strictObject({ unit: z.string(), sha256: z.string(), values: z.array(z.number()) });

/**
 * Opens the journal, and removes what killed processes left there of unfinished entries.
 * @param say receives a line about each damaged entry. @throws MaskrouteError `storage_failed` when the folder cannot
 * be used.
 */
export async function openUnitJournal(folder: string, say: (line: string) => void): Promise<UnitJournal> {
  const fileOf = (name: string) => join(folder, name.slice(0, 2), `${name}.json`);
  const id = await idOf(folder);
  for (const part of await readdir(folder))
    if (ENTRY_FOLDER.test(part)) await removeAllOldParts(join(folder, part));
  return {
    id,
    async read(name) {
      const text = await readFile(fileOf(name), 'utf8').catch((error: NodeJS.ErrnoException) => {
        if (error.code === 'ENOENT') return undefined;
        throw error;
      });
      if (text === undefined) return undefined;
      const values = valuesOf(name, text);
      if (values === undefined) say(`The journal's entry ${fileOf(name)} is damaged and is ignored.`);
      return values;
    },
    async write(name, values) {
      if (!values.every(Number.isFinite)) throw new RangeError(`the unit ${name} gave ${values}`);
      await mkdir(dirname(fileOf(name)), { recursive: true });
      const entry = { unit: name, sha256: contentKey([name, values]), values };
      await writeWhole(fileOf(name), `${JSON.stringify(entry)}\n`);
    },
  };
}

/** The first process writes the folder's id; the others wait until it is there. */
async function idOf(folder: string): Promise<string> {
  const file = join(folder, HEAD_FILE);
  try {
    await makeFolder(folder);
    await createWhole(file, JSON.stringify({ id: randomUUID() }));
  } catch (cause) {
    throw unusable(folder, cause);
  }
  for (let looked = 0; looked < HEAD_LOOKS; looked++) {
    const head = await readOwnJson(file, headSchema);
    if (head !== undefined) return head.id;
    await sleep(HEAD_LOOK_ms);
  }
  throw unusable(folder, new Error(`${file} is damaged; delete it`));
}

const unusable = (folder: string, cause: unknown): MaskrouteError =>
  new MaskrouteError(
    'storage_failed',
    `The journal's folder ${resolve(folder)} cannot be used: ${(cause as Error).message}`,
    { cause },
  );

function valuesOf(name: string, text: string): readonly number[] | undefined {
  try {
    const { unit, sha256, values } = entrySchema.parse(JSON.parse(text));
    return unit === name && sha256 === contentKey([name, values]) ? values : undefined;
  } catch {
    return undefined;
  }
}
