/**
 * What units came to, a file each in a folder that the run and all its workers see. This is where the truth of a run on many
 * machines lives; the queue only says what is still to be done. An entry carries a hash of itself and of its name, so a
 * damaged one is no entry, and the unit is computed again.
 */
import { randomUUID } from 'node:crypto';
import { mkdir, readFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { z } from 'zod';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { createWhole, readOwnJson, writeWhole } from '../../files.ts';
import { contentKey } from '../journal.ts';

export type UnitJournal = {
  /** Of the folder, wherever it is mounted: who reads another one is not in the same run. */
  readonly id: string;
  /** `undefined` where there is no entry, or a damaged one. */
  read(name: string): Promise<readonly number[] | undefined>;
  /** @throws RangeError for numbers that could not be read back, such as NaN. */
  write(name: string, values: readonly number[]): Promise<void>;
};

const HEAD_FILE = 'journal.json';
const headSchema = z.object({ id: z.uuid() });
/** To be written by another machine on a file system that shows it half-written, and seen here. */
const [HEAD_LOOKS, HEAD_LOOK_ms] = [20, 100];
const entrySchema = z.strictObject({ unit: z.string(), sha256: z.string(), values: z.array(z.number()) });

/** @param say hears of damaged entries. @throws MaskrouteError `storage_failed` when the folder cannot be used. */
export async function openUnitJournal(folder: string, say: (line: string) => void): Promise<UnitJournal> {
  const fileOf = (name: string) => join(folder, name.slice(0, 2), `${name}.json`);
  return {
    id: await idOf(folder),
    async read(name) {
      const text = await readFile(fileOf(name), 'utf8').catch((error: NodeJS.ErrnoException) => {
        if (error.code === 'ENOENT') return undefined;
        throw error;
      });
      if (text === undefined) return undefined;
      const values = valuesOf(name, text);
      if (values === undefined) say(`The journal's entry ${fileOf(name)} is damaged; it counts for nothing.`);
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

/** Whoever comes first gives the folder its id; the others wait until it is written. */
async function idOf(folder: string): Promise<string> {
  const file = join(folder, HEAD_FILE);
  try {
    await mkdir(folder, { recursive: true });
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
