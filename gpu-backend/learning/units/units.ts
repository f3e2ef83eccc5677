/** Who computes a run's units: this process, one after the other, or whoever takes them from a queue. */
import type { InstalledModel } from '../../model/store.ts';
import type { Surrogates } from '../../model/surrogates.ts';
import type { Device } from '../../onnx/device.ts';
import type { Unit } from './unit.ts';

export type Units = AsyncDisposable & {
  /** How many units are worth asking for at a time. */
  readonly atOnce: number;
  /** Its numbers. The same unit comes to the same numbers, wherever it is computed. Rejects when the run is stopped. */
  run(unit: Unit): Promise<readonly number[]>;
};

export type UnitsOptions = {
  readonly model: InstalledModel;
  readonly surrogates: Surrogates | undefined;
  readonly threads: number;
  /** What runs masks; the processor unless given. Whoever takes units from a queue has its own. */
  readonly device?: Device | undefined;
  /** What this process may have of memory: the model is computed layer by layer where the whole takes more. What there is unless given. */
  readonly memory_bytes?: number | undefined;
  readonly signal: AbortSignal | undefined;
};

export type OpenUnits = (options: UnitsOptions) => Promise<Units>;

/** `work` on every item, at most so many at a time, begun in order; the results in the items' order. An error begins no more. */
export async function mapAtOnce<T, R>(
  items: readonly T[],
  atOnce: number,
  work: (item: T, index: number) => Promise<R>,
): Promise<R[]> {
  const results = new Array<R>(items.length);
  let next = 0;
  const lane = async () => {
    try {
      for (let index = next++; index < items.length; index = next++)
        results[index] = await work(items[index]!, index);
    } finally {
      next = items.length;
    }
  };
  await Promise.all(Array.from({ length: Math.min(atOnce, items.length) }, lane));
  return results;
}
