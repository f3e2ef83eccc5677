/**
 * Masks of an earlier set, with which a run begins instead of searching: they are assigned to clusters of the new
 * prompts, and compete with masks composed from them. That takes two thirds of a search's time, and suits a tenant
 * whose traffic has changed.
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
  /** The target sparsity of the earlier set. */
  readonly sparsity: number;
  /** Distinct masks; the mask for everybody first. */
  readonly masks: readonly [Mask, ...Mask[]];
  /** Block weights when the masks were learned; their sparsity refers to these. */
  readonly weights: BlockCounts;
};

const weight = z.number().positive();
/** The fields of a set's record that are needed here. */
const recordSchema = z.object({
  oneMask: z.string(),
  cost: z.enum(['blocks', 'time']),
  blockWeights: z.object({ attention: weight, ffn: weight }),
});

const refusal = (name: string, why: string) =>
  new MaskrouteError('invalid_request', `Learning cannot begin with ${name}: ${why}.`);

/**
 * Reads the masks of an earlier set. @throws MaskrouteError `invalid_request` when a run for this model and cost cannot
 * begin with them.
 */
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
  // With another table the masks stay good ones, and all that is said of them is measured anew.
  if (set.surrogate !== (surrogates !== undefined))
    throw refusal(name, `it was learned ${set.surrogate ? 'with' : 'without'} surrogates`);
  const record = recordSchema.safeParse(set.learned);
  if (!record.success) throw refusal(name, 'it does not say how it was learned');
  const { oneMask, cost: ofSet, blockWeights } = record.data;
  if (ofSet !== cost) throw refusal(name, `its sparsity is a share of ${ofSet}, not of ${cost}`);
  const [one, ...others] = new Set([oneMask, ...clusters.map(({ bits }) => bits)]);
  const maskOf = (bits: string) => maskFromBits(set.model.blockCount, bits);
  try {
    return {
      name,
      version: maskSetVersion(set),
      sparsity: set.targetSparsity,
      masks: [maskOf(one!), ...others.map(maskOf)],
      weights: blockWeights,
    };
  } catch (cause) {
    throw refusal(name, `its mask for everybody is damaged (${(cause as Error).message})`);
  }
}

/**
 * The masks that a run with this budget may begin with: the mask for everybody, and others of the same sparsity.
 * Lighter and heavier masks are made again.
 * @throws MaskrouteError `invalid_request` when the sparsity of the mask for everybody is not what the run asks for.
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
