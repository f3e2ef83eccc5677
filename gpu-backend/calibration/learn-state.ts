/**
 * What a killed run left behind: the block search of every finished cluster, valid for exactly the same inputs.
 * Everything else is quick to compute again and gives the same result by its seed.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { writeWhole } from '../write-whole.ts';

export const STATE_FILE = 'state.json';

const searchSchema = z.strictObject({
  alone: z.array(z.number()),
  skipped: z.array(z.int().min(0)),
});
export type StoredSearch = z.infer<typeof searchSchema>;

const stateSchema = z.strictObject({
  key: z.string(),
  clusters: z.record(z.string().regex(/^\d+$/), searchSchema),
});

export type LearnState = {
  get(cluster: number): StoredSearch | undefined;
  set(cluster: number, search: StoredSearch): Promise<void>;
};

/** `key`: a hash of everything that the searches depend on; a state of another key, or a damaged one, is dropped. */
export async function openLearnState(folder: string, key: string): Promise<LearnState> {
  const path = join(folder, STATE_FILE);
  const clusters = await readClusters(path, key);
  return {
    get: (cluster) => clusters[cluster],
    async set(cluster, search) {
      clusters[cluster] = search;
      await writeWhole(path, `${JSON.stringify({ key, clusters })}\n`);
    },
  };
}

async function readClusters(path: string, key: string): Promise<Record<string, StoredSearch>> {
  try {
    const state = stateSchema.parse(JSON.parse(await readFile(path, 'utf8')));
    return state.key === key ? state.clusters : {};
  } catch {
    return {};
  }
}
