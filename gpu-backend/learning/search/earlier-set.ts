/**
 * Masks of an earlier set, which a run begins with instead of searching: on new prompts they are shared out anew, and
 * compete with those that are composed from them. That takes two thirds of the time of a search, and is what a tenant's masks need when
 * its traffic has changed.
 */
import { z } from 'zod';
import { type Mask, maskFromBits } from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { InstalledModel } from '../../model/store.ts';
import type { Surrogates } from '../../model/surrogates.ts';
import { type BlockCounts, type Budget, countsOf, meetsBudget } from './budget.ts';
import type { BlockCost } from './effort.ts';

export type EarlierMasks = {
  readonly name: string;
  readonly version: string;
  /** What it was asked to leave out. */
  readonly sparsity: number;
  /** Each once; the one for everybody first. */
  readonly masks: readonly [Mask, ...Mask[]];
  /** What a block weighed when they were learned: what they leave out goes by that. */
  readonly weights: BlockCounts;
};

const weight = z.number().positive();
/** What `learn` writes into a set's record, as far as it is needed here. */
const recordSchema = z.object({
  oneMask: z.string(),
  cost: z.enum(['blocks', 'time']),
  blockWeights: z.object({ attention: weight, ffn: weight }),
});

const refusal = (name: string, why: string) =>
  new MaskrouteError('invalid_request', `Learning cannot begin with ${name}: ${why}.`);

/** @throws MaskrouteError `invalid_request` when a run of this model with this cost cannot begin with them. */
export function earlierMasks(
  set: MaskSet,
  {
    model,
    surrogates,
    cost,
  }: { model: InstalledModel; surrogates?: Surrogates | undefined; cost: BlockCost },
): EarlierMasks {
  const { manifest } = model;
  const { name, clusters } = set;
  if (set.model.hash !== manifest.hash)
    throw refusal(name, `it is for ${set.model.name}, not for ${manifest.name}`);
  if (set.surrogates !== surrogates?.id)
    throw refusal(name, 'it was learned with other surrogates, or without');
  const record = recordSchema.safeParse(set.learned);
  if (!record.success) throw refusal(name, 'it does not say how it was learned');
  const { oneMask, cost: ofSet, blockWeights } = record.data;
  if (ofSet !== cost) throw refusal(name, `its sparsity is a share of ${ofSet}, not of ${cost}`);
  const [one, ...others] = new Set([oneMask, ...clusters.map(({ bits }) => bits)]);
  const maskOf = (bits: string) => maskFromBits(set.model.blockCount, bits);
  try {
    return {
      ...{ name, version: maskSetVersion(set), sparsity: set.targetSparsity },
      masks: [maskOf(one!), ...others.map(maskOf)],
      weights: blockWeights,
    };
  } catch (cause) {
    throw refusal(name, `its mask for everybody is damaged (${(cause as Error).message})`);
  }
}

/**
 * Those that a run with this budget may begin with: the one for everybody, and others that leave out as much. Lighter and
 * heavier ones are made anew.
 * @throws MaskrouteError `invalid_request` when the mask for everybody leaves out more or less than the run asks for.
 */
export function masksWithin(
  { name, sparsity, masks: [one, ...others] }: EarlierMasks,
  budget: Budget,
): Mask[] {
  if (meetsBudget(one, budget)) return [one, ...others.filter((mask) => meetsBudget(mask, budget))];
  const { attention, ffn } = countsOf(one);
  throw refusal(
    name,
    `its mask for everybody leaves out ${attention} attention and ${ffn} FFN blocks, for a sparsity of ${sparsity}, not of ` +
      `${budget.targetSparsity}`,
  );
}
