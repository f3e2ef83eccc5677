/**
 * Predicts how long a step takes. The model is measured when the engine starts and corrected by every step, since other
 * programs may use the machine too.
 *
 * A step costs: a fixed time (the weights are read once), a time for each row (matrix products), and attention. A token of
 * an answer reads its sequence's K and V once. A piece of a prompt first rearranges them, which takes longer for each key,
 * and then its attention grows with rows times keys.
 */

import { denseMask } from '../../shared/mask/mask.ts';
import type { Runner } from './runner-interface.ts';

export type StepLoad = {
  readonly rows: number;
  /** Tokens of answers among the rows. */
  readonly tokens: number;
  /** Keys of sequences that decode, including the new ones. */
  readonly keys: number;
  /** Keys of sequences with a piece of a prompt. */
  readonly pieceKeys: number;
  /** Sum over all pieces of rows times keys. */
  readonly rowKeys: number;
};

export const NO_LOAD: StepLoad = { rows: 0, tokens: 0, keys: 0, pieceKeys: 0, rowKeys: 0 };

export const addLoads = (a: StepLoad, b: StepLoad): StepLoad => ({
  rows: a.rows + b.rows,
  tokens: a.tokens + b.tokens,
  keys: a.keys + b.keys,
  pieceKeys: a.pieceKeys + b.pieceKeys,
  rowKeys: a.rowKeys + b.rowKeys,
});

export type StepTimes = {
  readonly fixed_ms: number;
  readonly row_ms: number;
  readonly key_ms: number;
  readonly pieceKey_ms: number;
  readonly rowKey_ms: number;
};

/** Smoothing of the correction factors: after some seven steps half of a change is followed. */
const FOLLOW = 0.1;
/** Lower bound of a row's time, whatever is measured. */
const MIN_ROW_ms = 1e-3;
/** Most that one step counts as slower or faster than predicted; a stall says nothing about the next step. */
const FACTOR_MAX = 4;

/** Steps of tokens, of pieces, and of both have separate factors, as they run different graphs. */
type StepKind = 'tokens' | 'pieces' | 'both';
const kindOf = ({ rows, tokens }: StepLoad): StepKind =>
  tokens === 0 ? 'pieces' : tokens === rows ? 'tokens' : 'both';

export class StepCost {
  readonly #times: StepTimes;
  /** By kind: the time of recent steps divided by the time measured at the start. */
  readonly #factors = new Map<StepKind, number>();
  /** The factor of the last step, used for kinds that have not run yet. */
  #last = 1;

  constructor(times: StepTimes) {
    this.#times = times;
  }

  ms(load: StepLoad): number {
    return this.#factor(kindOf(load)) * this.#unscaled(load);
  }

  #factor(kind: StepKind): number {
    return this.#factors.get(kind) ?? this.#last;
  }

  #unscaled({ rows, keys, pieceKeys, rowKeys }: StepLoad): number {
    const { fixed_ms, row_ms, key_ms, pieceKey_ms, rowKey_ms } = this.#times;
    return fixed_ms + row_ms * rows + key_ms * keys + pieceKey_ms * pieceKeys + rowKey_ms * rowKeys;
  }

  /** How many rows of a prompt with `keys` keys may be added to a step so that it takes at most `until_ms`. */
  rowsUntil(until_ms: number, load: StepLoad, keys: number): number {
    const { row_ms, pieceKey_ms, rowKey_ms } = this.#times;
    const left = until_ms / this.#factor(load.tokens === 0 ? 'pieces' : 'both') - this.#unscaled(load);
    const rows = (left - pieceKey_ms * keys) / (row_ms + pieceKey_ms + rowKey_ms * keys);
    return Math.max(0, Math.floor(rows));
  }

  observe(load: StepLoad, took_ms: number): void {
    if (load.rows === 0) return;
    const kind = kindOf(load);
    const factor = this.#factor(kind);
    const measured = took_ms / this.#unscaled(load);
    const bounded = Math.min(Math.max(measured, factor / FACTOR_MAX), factor * FACTOR_MAX);
    this.#last = factor + FOLLOW * (bounded - factor);
    this.#factors.set(kind, this.#last);
  }
}

const PROBE_ROWS = 16;
const PROBE_KEYS = 1024;

/**
 * Runs single-sequence steps, a token and pieces, with few and with many keys, and solves for the times. Each step is run
 * twice and the faster run counts, since the first may touch new memory.
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
  const twoFar = await probe(2, keys);
  const far = (await probe(1, keys)) - one;
  cache.truncate(0);
  const row_ms = Math.max(MIN_ROW_ms, (more - one) / (rows - 1));
  const pair = Math.max(0, twoFar - one - row_ms);
  const rowKey_ms = Math.max(0, (moreFar - pair) / ((rows - 2) * keys));
  return {
    fixed_ms: Math.max(0, one - row_ms),
    row_ms,
    key_ms: Math.max(0, far / keys),
    pieceKey_ms: Math.max(0, pair / keys - 2 * rowKey_ms),
    rowKey_ms,
  };
}
