/** The state of an unfinished run, beside the file that it will write: arrays in V8's own format, put in place whole. */
import { readFile, rm } from 'node:fs/promises';
import { deserialize, serialize } from 'node:v8';
import type { SurrogateTable } from '../model/surrogates.ts';
import { writeWhole } from '../write-whole.ts';
import type { DistillState } from './distill-surrogates.ts';

/** What a run has so far; `state` once distillation has begun. */
export type Run = {
  readonly table: SurrogateTable;
  readonly costs: readonly number[] | undefined;
  readonly state: DistillState | undefined;
};
export type RunStore = {
  readonly run: Run | undefined;
  write(run: Run): Promise<void>;
  remove(): Promise<void>;
};

/** A file that does not read, or that other inputs left, is no run: it is begun anew. */
export async function openRunStore(path: string, key: string): Promise<RunStore> {
  const found = await readFile(path)
    .then((bytes) => deserialize(bytes) as { key: string; run: Run })
    .catch(() => undefined);
  return {
    run: found?.key === key ? found.run : undefined,
    write: (run) => writeWhole(path, serialize({ key, run })),
    remove: () => rm(path, { force: true }),
  };
}
