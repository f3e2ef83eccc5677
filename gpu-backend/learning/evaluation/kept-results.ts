/**
 * Results that were paid for, kept by content under the home folder: one file of JSON lines a question (model,
 * texts, …), one line an answer. A killed evaluation loses the line that it was computing; the same command
 * started again reads the rest back.
 */
import { createHash } from 'node:crypto';
import { appendFile, mkdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { canonicalJson } from '../../../shared/mask-set.ts';

export type Journal<T> = {
  readonly size: number;
  get(name: string): T | undefined;
  set(name: string, value: T): Promise<void>;
};

const lineSchema = z.tuple([z.string(), z.json()]);

/** `question`: everything that the answers depend on. Lines that do not fit the schema are as good as absent. */
export async function openJournal<T>(
  home: string,
  question: unknown,
  schema: z.ZodType<T>,
): Promise<Journal<T>> {
  const folder = join(home, 'evaluations');
  await mkdir(folder, { recursive: true });
  const key = createHash('sha256').update(canonicalJson(question)).digest('hex').slice(0, 32);
  const path = join(folder, `${key}.jsonl`);
  const { known, torn } = await readKnown(path, schema);
  // A torn last line must not swallow the next one.
  if (torn) await appendFile(path, '\n');
  return {
    get size() {
      return known.size;
    },
    get: (name) => known.get(name),
    async set(name, value) {
      known.set(name, value);
      await appendFile(path, `${JSON.stringify([name, value])}\n`);
    },
  };
}

async function readKnown<T>(path: string, schema: z.ZodType<T>) {
  const known = new Map<string, T>();
  const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return '';
    throw error;
  });
  for (const line of text.split('\n')) {
    const parsed = parseLine(line, schema);
    if (parsed !== undefined) known.set(...parsed);
  }
  return { known, torn: text !== '' && !text.endsWith('\n') };
}

function parseLine<T>(line: string, schema: z.ZodType<T>): [string, T] | undefined {
  try {
    const [name, value] = lineSchema.parse(JSON.parse(line));
    return [name, schema.parse(value)];
  } catch {
    return undefined;
  }
}
