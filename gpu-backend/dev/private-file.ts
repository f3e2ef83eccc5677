/** Files that hold keys: readable by their owner alone, and never seen half-written. */
import { readFile, rename, rm, writeFile } from 'node:fs/promises';
import type { z } from 'zod';

/** Replaces the file atomically; mode 0600 from its first byte on. */
export async function writePrivateJson(file: string, value: unknown): Promise<void> {
  const incoming = `${file}.incoming-${process.pid}`;
  await rm(incoming, { force: true });
  await writeFile(incoming, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o600, flag: 'wx' });
  await rename(incoming, file);
}

/** `undefined` when the file is absent, or is not what `schema` asks for. */
export async function readPrivateJson<T>(file: string, schema: z.ZodType<T>): Promise<T | undefined> {
  try {
    return schema.safeParse(JSON.parse(await readFile(file, 'utf8'))).data;
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}
