/** The interface to whatever computes a run's units: this process, one after the other, or workers of a queue. */
import type { InstalledModel } from '../../model/store.ts';
import type { Surrogates } from '../../model/surrogates.ts';
import type { Device } from '../../onnx/device.ts';
import type { Rounding } from '../gates/rounding.ts';
import type { Unit } from './unit.ts';

export type Units = AsyncDisposable & {
  /** How many units to request concurrently. */
  readonly atOnce: number;
  /** The unit's result. Equal units give equal results, wherever they are computed. Rejects when the run is stopped. */
  run(unit: Unit): Promise<readonly number[]>;
};

export type UnitsOptions = {
  readonly model: InstalledModel;
  readonly surrogates: Surrogates | undefined;
  readonly threads: number;
  /** Of all machines that compute for the run. */
  readonly rounding: Rounding;
  /** Device that runs masks; the CPU unless given. Workers of a queue choose their own. */
  readonly device?: Device | undefined;
  /**
   * Memory that this process may use; all that is available unless given. If the whole model needs more, it is computed
   * layer by layer.
   */
  readonly memory_bytes?: number | undefined;
  readonly signal: AbortSignal | undefined;
};

export type OpenUnits = (options: UnitsOptions) => Promise<Units>;

/**
 * Calls `work` for every item, started in order, at most so many at a time. Returns results in the items' order. After
 * an error no more items are started.
 */
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
