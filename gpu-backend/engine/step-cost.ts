/**
 * What a step takes, before it is run: measured when the engine starts, and held against every step since, so that it follows
 * a machine that others use too.
 *
 * Weights are read once a step, whoever runs; products grow by the row; each sequence's K and V are read once; attention's
 * products grow by rows times keys.
 */

import { denseMask } from '../../shared/mask/mask.ts';
import type { Runner } from './runner.ts';

export type StepLoad = {
  readonly rows: number;
  /** Keys of all sequences, the new ones counted. */
  readonly keys: number;
  /** Over all sequences: its rows times its keys. */
  readonly rowKeys: number;
};

export const NO_LOAD: StepLoad = { rows: 0, keys: 0, rowKeys: 0 };

export const addLoads = (a: StepLoad, b: StepLoad): StepLoad => ({
  rows: a.rows + b.rows,
  keys: a.keys + b.keys,
  rowKeys: a.rowKeys + b.rowKeys,
});

export type StepTimes = {
  readonly fixed_ms: number;
  readonly row_ms: number;
  readonly key_ms: number;
  readonly rowKey_ms: number;
};

/** How fast the factor follows: half of a change in some seven steps. */
const FOLLOW = 0.1;
/** Whatever is measured: a row takes time. */
const MIN_ROW_ms = 1e-3;
/** A step that stood still says nothing about the next one. */
const FACTOR_MAX = 4;

export class StepCost {
  readonly #times: StepTimes;
  /** What steps take now, against what was measured at the start. */
  #factor = 1;

  constructor(times: StepTimes) {
    this.#times = times;
  }

  ms({ rows, keys, rowKeys }: StepLoad): number {
    return this.#factor * this.#unscaled(rows, keys, rowKeys);
  }

  #unscaled(rows: number, keys: number, rowKeys: number): number {
    const { fixed_ms, row_ms, key_ms, rowKey_ms } = this.#times;
    return fixed_ms + row_ms * rows + key_ms * keys + rowKey_ms * rowKeys;
  }

  /** How many rows of a sequence with `keys` keys may be added to a step until it takes `until_ms`; none is 0. */
  rowsUntil(until_ms: number, load: StepLoad, keys: number): number {
    const { row_ms, key_ms, rowKey_ms } = this.#times;
    const left = until_ms - this.ms(load) - this.#factor * key_ms * keys;
    return Math.max(0, Math.floor(left / (this.#factor * (row_ms + key_ms + rowKey_ms * keys))));
  }

  observe({ rows, keys, rowKeys }: StepLoad, took_ms: number): void {
    if (rows === 0) return;
    const measured = took_ms / this.#unscaled(rows, keys, rowKeys);
    const bounded = Math.min(Math.max(measured, this.#factor / FACTOR_MAX), this.#factor * FACTOR_MAX);
    this.#factor += FOLLOW * (bounded - this.#factor);
  }
}

const PROBE_ROWS = 16;
const PROBE_KEYS = 512;

/**
 * Four steps of one sequence: one row and several, with few keys and many. Each is run twice, and the quicker run counts: a first
 * one may find memory that nobody used yet.
 */
export async function measureStepTimes(runner: Runner): Promise<StepTimes> {
  const { contextTokens, layerCount } = runner.config;
  const rows = Math.min(PROBE_ROWS, contextTokens >> 2);
  const keys = Math.min(PROBE_KEYS, contextTokens >> 1);
  const plan = { mask: denseMask(2 * layerCount), kv: 'preserve' } as const;
  const cache = runner.newCache();
  cache.reserve(keys + rows);
  const probe = async (rowCount: number, past: number): Promise<number> => {
    let least_ms = Number.POSITIVE_INFINITY;
    for (let turn = 0; turn < 2; turn++) {
      cache.length = past;
      const begun_ms = performance.now();
      await runner.run({ cache, tokenIds: new Array<number>(rowCount).fill(0), plan, logitRows: [0] });
      least_ms = Math.min(least_ms, performance.now() - begun_ms);
    }
    return least_ms;
  };
  const more = await probe(rows, 0);
  const one = await probe(1, 0);
  cache.fill(keys);
  const moreFar = (await probe(rows, keys)) - more;
  const far = (await probe(1, keys)) - one;
  cache.truncate(0);
  const rowKey_ms = Math.max(0, (moreFar - far) / ((rows - 1) * keys));
  const key_ms = Math.max(0, far / keys - rowKey_ms);
  const row_ms = Math.max(MIN_ROW_ms, (more - one) / (rows - 1));
  return { fixed_ms: Math.max(0, one - row_ms), row_ms, key_ms, rowKey_ms };
}
