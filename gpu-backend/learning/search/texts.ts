/**
 * Texts that masks are searched, chosen and learned on: drawn from calibration rows by a seed, and made into batches.
 */

import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { createRandom, permutation } from '../../random.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { SampledRow, Scored } from '../data/samples.ts';
import { drawRows } from '../data/samples.ts';
import { batchSamples, type SampleBatch } from '../gates/batches.ts';

export type Text = {
  /** Identifies the text in the journal: the same name means the same text. */
  readonly name: string;
  /** In an order that mixes short and long ones. */
  readonly batches: readonly SampleBatch[];
};

type TextSettings = {
  readonly seed: number;
  /** Tokens of one sequence beside its system prompt, cut at the end. */
  readonly tokensMax: number;
  readonly contextTokens: number;
  readonly scored: Scored;
};

export type TextMaker = {
  /**
   * @param name distinct names draw distinct rows, as far as there are any.
   * @param positions scored positions wanted; fewer when the rows end before.
   * @param batchTokens tokens of one batch, with padding.
   */
  text(name: string, rows: readonly CalibrationRow[], positions: number, batchTokens: number): Text;
  /** Rows one by one, drawn likewise. */
  draw(name: string, rows: readonly CalibrationRow[], positions: number): SampledRow[];
};

export function createTextMaker(modelText: ModelText, eosTokenId: number, settings: TextSettings): TextMaker {
  const randomFor = (name: string) => createRandom(hashOf(`${settings.seed} ${name}`));
  const draw: TextMaker['draw'] = (name, rows, positions) =>
    drawRows(rows, modelText, eosTokenId, randomFor(name), { ...settings, positions });
  return {
    draw,
    text(name, rows, positions, batchTokens) {
      const samples = draw(name, rows, positions).map(({ sample }) => sample);
      const sorted = batchSamples(samples, batchTokens);
      const order = permutation(sorted.length, randomFor(`${name} order`));
      return { name, batches: Array.from(order, (index) => sorted[index]!) };
    },
  };
}

/** FNV-1a hash of a name: distinct names get distinct random streams. */
function hashOf(name: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 0x01000193);
  return hash >>> 0;
}
