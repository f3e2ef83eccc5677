/**
 * Texts that masks are searched, chosen and learned on: drawn from calibration rows by a seed, and made into batches
 * with their targets when they are first needed. A run that goes on after a kill needs few of them again.
 */

import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { createRandom, permutation } from '../../random.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { SampledRow, Scored } from '../data/samples.ts';
import { drawRows } from '../data/samples.ts';
import type { GateBatch, SampleBatch } from '../gates/batches.ts';
import { batchSamples, nextTokenTargets } from '../gates/batches.ts';
import type { Teacher } from '../gates/teacher.ts';
import type { TargetKind } from './effort.ts';

export type Text = {
  /** Names the text in the journal: the same name means the same text. */
  readonly name: string;
  /** Batches, in an order that mixes short and long ones. */
  readonly batchCount: number;
  batch(index: number): Promise<GateBatch>;
};

type TextSettings = {
  readonly seed: number;
  /** Tokens of one sequence, cut at the end. */
  readonly tokensMax: number;
  readonly targets: TargetKind;
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

export function createTextMaker(
  modelText: ModelText,
  eosTokenId: number,
  teacher: Pick<Teacher, 'teach'>,
  settings: TextSettings,
): TextMaker {
  const randomFor = (name: string) => createRandom(hashOf(`${settings.seed} ${name}`));
  const draw: TextMaker['draw'] = (name, rows, positions) =>
    drawRows(rows, modelText, eosTokenId, randomFor(name), { ...settings, positions });
  const withTargets = async (batch: SampleBatch): Promise<GateBatch> =>
    settings.targets === 'dense' ? teacher.teach(batch) : nextTokenTargets(batch);
  return {
    draw,
    text(name, rows, positions, batchTokens) {
      const samples = draw(name, rows, positions).map(({ sample }) => sample);
      const sorted = batchSamples(samples, batchTokens);
      const order = permutation(sorted.length, randomFor(`${name} order`));
      const batches = Array.from(order, (index) => sorted[index]!);
      const made = new Map<number, Promise<GateBatch>>();
      return {
        name,
        batchCount: batches.length,
        batch(index) {
          const known = made.get(index) ?? withTargets(batches[index]!);
          made.set(index, known);
          return known;
        },
      };
    },
  };
}

/** FNV-1a of a name's characters: distinct streams of random numbers for distinct names. */
function hashOf(name: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 0x01000193);
  return hash >>> 0;
}
