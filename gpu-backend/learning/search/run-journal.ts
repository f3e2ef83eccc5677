/**
 * How a killed run goes on: everything between two evaluations of the model is a function of their results, so
 * results are written down as they come, and a run that is started again reads them instead of computing them.
 * It takes the same decisions and ends with the same bytes.
 *
 * One JSON line a result. The first line names everything that the results depend on.
 * A line that a kill tore is dropped, with what stands behind it.
 */
import { type FileHandle, mkdir, open, readFile, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { z } from 'zod';
import { writeWhole } from '../../write-whole.ts';

const headSchema = z.strictObject({ key: z.string() });
const lineSchema = z.tuple([z.string(), z.array(z.number())]);

export type Journal = {
  /** Results that an earlier process left. */
  readonly found: number;
  /** The numbers called `name`: as they were written down, or computed now and written down. */
  numbers(name: string, compute: () => Promise<readonly number[]>): Promise<readonly number[]>;
  close(): Promise<void>;
  /** Closes, and forgets everything: the run is over. */
  remove(): Promise<void>;
};

/** `key`: a hash of everything that results depend on; a journal of another key is begun anew. */
export async function openJournal(path: string, key: string): Promise<Journal> {
  await mkdir(dirname(path), { recursive: true });
  const known = new Map(parseJournal(await readOrNothing(path), key));
  const lines = [{ key }, ...known].map((line) => `${JSON.stringify(line)}\n`);
  await writeWhole(path, lines.join(''));
  const file: FileHandle = await open(path, 'a');
  let isOpen = true;
  const close = async () => {
    if (isOpen) await file.close();
    isOpen = false;
  };
  return {
    found: known.size,
    async numbers(name, compute) {
      const before = known.get(name);
      if (before !== undefined) return before;
      const values = await compute();
      if (!values.every(Number.isFinite)) throw new RangeError(`${name} gave ${values.join()}`);
      known.set(name, [...values]);
      await file.appendFile(`${JSON.stringify([name, [...values]])}\n`);
      return values;
    },
    close,
    async remove() {
      await close();
      await rm(path, { force: true });
    },
  };
}

type Line = z.infer<typeof lineSchema>;

/** Lines up to the first that is not whole; none when the head is missing or another run's. */
function parseJournal(text: string, key: string): Line[] {
  // What follows the last line's end is torn.
  const [first, ...rest] = text.split('\n').slice(0, -1);
  const head = headSchema.safeParse(parseLine(first ?? ''));
  if (!head.success || head.data.key !== key) return [];
  const lines: Line[] = [];
  for (const line of rest) {
    const parsed = lineSchema.safeParse(parseLine(line));
    if (!parsed.success) break;
    lines.push(parsed.data);
  }
  return lines;
}

function parseLine(line: string): unknown {
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
