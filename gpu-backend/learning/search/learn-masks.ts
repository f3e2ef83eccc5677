/**
 * From groups of prompts to the mask of each: one mask learned on everything; every cluster's own search from there;
 * the choice among all masks on prompts that no search saw, confirmed on more of them; figures on held-out prompts.
 */

import type { Mask } from '../../../shared/mask/mask.ts';
import { maskBits } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { Prompts } from '../data/prompt-groups.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { Sample } from '../data/samples.ts';
import type { LearnEffort, MaskStage } from './effort.ts';
import type { HeldOutScores } from './score-masks.ts';
import type { Candidate, MaskSearch, Proposal } from './search-masks.ts';
import { compareMasks, confirmChoice, searchClusterMask, searchOneMask } from './search-masks.ts';
import type { TextMaker } from './texts.ts';
import type { Lead, Workbench } from './workbench.ts';

export type LearnedMask = {
  readonly mask: Mask;
  readonly source: string;
  /** All that competed, the chosen one first, the others by rising KL. */
  readonly candidates: readonly Candidate[];
  /** Of the best candidate over the mask for everybody, on other text; undefined when the best was that mask. */
  readonly lead: Lead | undefined;
  readonly search: MaskSearch;
};

export type LearnedMasks = {
  readonly one: LearnedMask;
  readonly clusters: readonly LearnedMask[];
  /** By cluster; `undefined` where no held-out prompt is. */
  readonly heldOut: readonly (HeldOutPair | undefined)[];
};
export type HeldOutPair = { readonly learned: HeldOutScores; readonly one: HeldOutScores };

type LearnMasksContext = {
  readonly bench: Workbench;
  readonly prompts: Prompts;
  readonly texts: TextMaker;
  readonly effort: LearnEffort;
  /** Exact scores by the serving engine, of several masks on the same samples; `name` says which samples. */
  measure(name: string, samples: readonly Sample[], masks: readonly Mask[]): Promise<HeldOutScores[]>;
  onStage(stage: MaskStage, cluster?: number): void;
};

/** @throws MaskrouteError `invalid_data` when no row is long enough to score a mask on. */
export async function learnMasks(context: LearnMasksContext): Promise<LearnedMasks> {
  const { everybody, groups } = context.prompts;
  context.onStage('one mask');
  if (!isScorable(context, everybody.search))
    throw new MaskrouteError('invalid_data', 'No row is long enough to score a mask on.');
  const one = await learnOne(context);
  // A single cluster is everybody.
  const clusters = groups.length === 1 ? [one] : await learnClusters(context, one);
  return { one, clusters, heldOut: await measureAll(context, one.mask, clusters) };
}

async function learnClusters(context: LearnMasksContext, one: LearnedMask): Promise<LearnedMask[]> {
  const { bench, effort } = context;
  const { everybody, groups } = context.prompts;
  const searches: MaskSearch[] = [];
  for (const [cluster, { search }] of groups.entries()) {
    context.onStage('masks', cluster);
    const rows = isScorable(context, search) ? search : everybody.search;
    const name = nameOf(context, cluster);
    const starts: [Mask, ...Mask[]] = [one.mask, ...searches.map(lastMask)];
    searches.push(await searchClusterMask(bench, name, rows, starts, one.search.worth, effort.cluster));
  }
  const clusters: LearnedMask[] = [];
  for (const [cluster, { choice: own }] of groups.entries()) {
    context.onStage('choose', cluster);
    const rows = isScorable(context, own) ? own : everybody.choice;
    const on = bench.costOn(`${nameOf(context, cluster)} choice`, rows, 2 * effort.choicePositions, 'half');
    const candidates = await compareMasks(proposalsFor(cluster, one.mask, searches), on.atAGlance);
    const choice = await confirmChoice(candidates, one.mask, on);
    clusters.push({ ...choice, search: searches[cluster]! });
  }
  return clusters;
}

async function learnOne({ bench, prompts, effort }: LearnMasksContext): Promise<LearnedMask> {
  const search = await searchOneMask(bench, prompts.everybody.search, effort.one);
  const on = bench.costOn('one choice', prompts.everybody.choice, 2 * effort.choicePositions);
  const candidates = await compareMasks(search.proposals, on.ofMask);
  const [{ mask, source }] = candidates as [Candidate, ...Candidate[]];
  return { mask, source, candidates, search, lead: undefined };
}

/** The mask for everybody, which wins ties; the cluster's own; and the best that other clusters found. */
function proposalsFor(cluster: number, one: Mask, searches: readonly MaskSearch[]): Proposal[] {
  const others = searches.flatMap((search, other) =>
    other === cluster ? [] : [{ source: `cluster ${other}`, mask: lastMask(search) }],
  );
  return [{ source: 'one mask', mask: one }, ...searches[cluster]!.proposals, ...others];
}

/** The best of a search, by its own text. */
const lastMask = ({ proposals }: MaskSearch): Mask => proposals.at(-1)!.mask;

async function measureAll(
  context: LearnMasksContext,
  one: Mask,
  clusters: readonly LearnedMask[],
): Promise<(HeldOutPair | undefined)[]> {
  const { prompts, texts, effort } = context;
  const results: (HeldOutPair | undefined)[] = [];
  for (const [cluster, { mask }] of clusters.entries()) {
    context.onStage('measure', cluster);
    const name = `${nameOf(context, cluster)} held-out`;
    const samples = texts.samples(name, prompts.groups[cluster]!.heldOut, effort.heldOutPositions);
    if (samples.length === 0) {
      results.push(undefined);
      continue;
    }
    const same = maskBits(mask) === maskBits(one);
    const [learned, alone] = await context.measure(name, samples, same ? [mask] : [mask, one]);
    results.push({ learned: learned!, one: alone ?? learned! });
  }
  return results;
}

/** Unique among all numbers of clusters that share a journal. */
const nameOf = ({ prompts }: LearnMasksContext, cluster: number): string =>
  `cluster ${cluster} of ${prompts.groups.length}`;

const isScorable = ({ texts }: LearnMasksContext, rows: readonly CalibrationRow[]): boolean =>
  texts.samples('scorable', rows, 1).length > 0;
