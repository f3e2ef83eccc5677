/**
 * What a step takes, before it is run: measured when the engine starts, and held against every step since, so that it follows
 * a machine that others use too.
 *
 * Weights are read once a step, whoever runs; products grow by the row. A token of an answer reads its sequence's K and V once. A piece
 * of a prompt puts them in order first, which takes longer, and then attention's products grow by rows times keys.
 */

import { denseMask } from '../../shared/mask/mask.ts';
import type { Runner } from './runner.ts';

export type StepLoad = {
  readonly rows: number;
  /** Tokens of answers among the rows. */
  readonly tokens: number;
  /** Keys of sequences whose answers go on, the new ones counted. */
  readonly keys: number;
  /** Keys of those whose prompts do. */
  readonly pieceKeys: number;
  /** Over all pieces: its rows times its keys. */
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

/** How fast a factor follows: half of a change in some seven steps. */
const FOLLOW = 0.1;
/** Whatever is measured: a row takes time. */
const MIN_ROW_ms = 1e-3;
/** A step that stood still says nothing about the next one. */
const FACTOR_MAX = 4;

/** Steps of answers alone, of prompts alone, and of both: other runs of other graphs. */
type StepKind = 'tokens' | 'pieces' | 'both';
const kindOf = ({ rows, tokens }: StepLoad): StepKind =>
  tokens === 0 ? 'pieces' : tokens === rows ? 'tokens' : 'both';

export class StepCost {
  readonly #times: StepTimes;
  /** What steps of a kind take now, against what was measured at the start. */
  readonly #factors = new Map<StepKind, number>();
  /** Of the last step: a kind that did not come yet is no faster and no slower. */
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

  /** How many rows of a prompt with `keys` keys may be added to a step until it takes `until_ms`; none is 0. */
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
 * Steps of one sequence: a token and pieces, with few keys and many. Each is run twice, and the quicker run counts: a first
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
