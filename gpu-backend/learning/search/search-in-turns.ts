/**
 * Searches masks and assigns them to clusters in turns, like k-means with masks as means: masks are searched for groups
 * of clusters, and every cluster gets the mask that measures best on its own prompts, which no search saw. The clusters
 * of one mask are a group of the next turn. It ends when all groups were searched before.
 */
import { type Mask, maskBits } from '../../../shared/mask/mask.ts';
import { centroidPoints } from '../data/clusters.ts';
import { groupsBy, kMeans } from '../data/kmeans.ts';
import type { Prompts } from '../data/prompt-groups.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { Sample, SampledRow } from '../data/samples.ts';
import { contentKey } from '../journal.ts';
import { mapAtOnce } from '../units/units.ts';
import { weightSkipped, withChanged } from './budget.ts';
import { blocksToChange, composeMasks, type RowChanges } from './compose-masks.ts';
import type { LearnEffort } from './effort.ts';
import { worthOfBlocks } from './exchange.ts';
import type { ProgressTracker } from './progress.ts';
import { resizeMask } from './resize-mask.ts';
import type { SampleScores } from './score-masks.ts';
import { type MaskSearch, type Proposal, searchGroupMask } from './search-masks.ts';
import { bestForAll, type Expected, type RowCosts, shareMasks } from './share-masks.ts';
import type { TextMaker } from './texts.ts';
import type { Workbench } from './workbench.ts';

/** A mask that was found, by the search for everybody or for a group of clusters. */
export type FoundMask = Proposal & { readonly search: MaskSearch };

export type LearnMasksContext = {
  readonly bench: Workbench;
  readonly prompts: Prompts;
  readonly texts: TextMaker;
  readonly effort: LearnEffort;
  /** Masks of an earlier set, the one for everybody first: nothing is searched then. */
  readonly known: readonly Mask[] | undefined;
  /** Requested number of masks; undefined: as many as pay off. */
  readonly maskCount: number | undefined;
  /** How many searches and rows to work on concurrently. */
  readonly atOnce: number;
  /** Exact scores by the serving engine. */
  score(sample: Sample, masks: readonly Mask[]): Promise<SampleScores[]>;
  readonly track: ProgressTracker;
};

type Searched = {
  readonly pool: readonly FoundMask[];
  readonly costs: readonly RowCosts[];
  readonly turns: number;
  /** The mask for everybody, an index into the pool. */
  readonly base: number;
  /** The share that each mask of the pool skips, if there are several sizes. */
  readonly skipped?: readonly number[] | undefined;
  /** Predicted cost of composed masks for each cluster, minus that of the mask for everybody, nats a position. */
  readonly expected?: Expected | undefined;
};

export async function searchInTurns(context: LearnMasksContext, one: FoundMask): Promise<Searched> {
  const { bench, prompts, texts, effort, maskCount } = context;
  const clusterCount = prompts.clusters.sizes.length;
  const most = maskCount ?? effort.masksMax;
  // The only mask is known already.
  if (most === 1) return { pool: [one], costs: [], turns: 0, base: 0 };
  const rows = texts.draw('share', prompts.everybody.choice, effort.sharePositions);
  const pool = [one];
  for (const proposal of one.search.proposals) addTo(pool, { ...proposal, search: one.search });
  const searched = new Set<string>();
  let groups = groupsByMeaning(prompts, most, bench.seed);
  let state: Searched = { pool: [one], costs: [], turns: 0, base: 0 };
  const measured = async (turns: number): Promise<Searched> => {
    const masks = [...pool];
    const costs = await measureRows(context, rows, masks);
    return { pool: masks, costs, turns, base: bestForAll(costs, 0) };
  };
  if (context.known !== undefined) state = await measured(0);
  for (let turn = 1; turn <= effort.turns; turn++) {
    const fresh = groups.filter((clusters) => !searched.has(nameOf(prompts, clusters)));
    if (fresh.length === 0) break;
    if (context.atOnce > 1) context.track.onStage('masks');
    const found = await mapAtOnce(fresh, context.atOnce, async (clusters, group) => {
      if (context.atOnce === 1) context.track.onStage('masks', { group, groups: fresh.length });
      searched.add(nameOf(prompts, clusters));
      const starts = startsFor(state, clusters);
      return await searchGroup(context, clusters, starts, one.search.worth);
    });
    for (const mask of found.flat()) addTo(pool, mask);
    state = await measured(turn);
    const sharing = shareMasks(state.costs, { clusterCount, base: state.base, maskCount: most });
    groups = groupsBy(sharing.clusters);
  }
  return withSizes(context, rows, await withComposed(context, rows, state));
}

/**
 * Adds masks composed from the effects of single blocks. The effects are measured on prompts that searches saw; the
 * masks are measured on the same rows as the others.
 */
async function withComposed(
  context: LearnMasksContext,
  rows: readonly SampledRow[],
  state: Searched,
): Promise<Searched> {
  const { bench, effort, prompts, texts, track, maskCount, score, atOnce } = context;
  const { masks, blocks: blockCount, positions } = effort.compose;
  if (masks === 0) return state;
  track.onStage('compose');
  const base = state.pool[state.base]!;
  const on = bench.costOn('compose', prompts.everybody.search, effort.group.searchPositions);
  const worth = await worthOfBlocks(on.atAGlance, base.mask, state.pool[0]!.search.worth);
  const blocks = blocksToChange(base.mask, worth, blockCount);
  const changed = [base.mask, ...blocks.map((block) => withChanged(base.mask, [block]))];
  const drawn = texts.draw('compose', prompts.everybody.search, positions);
  track.onStage('compose', { results: drawn.length });
  const changes = await mapAtOnce(drawn, atOnce, async ({ row, sample }): Promise<RowChanges> => {
    const [own, ...others] = await score(sample, changed);
    track.onResult();
    return {
      cluster: prompts.clusterOf.get(row)!,
      positions: own!.positions,
      changes: others.map(({ kl }) => kl - own!.kl),
    };
  });
  const found = composeMasks(changes, {
    start: base.mask,
    blocks,
    budget: bench.budget,
    prompts: prompts.clusters.sizes,
    seed: bench.seed,
    centroids: centroidPoints(prompts.clusters),
    maskCount: maskCount ?? masks,
  });
  const pool = [...state.pool];
  for (const { mask } of found)
    addTo(pool, { mask, source: 'composed for some clusters', search: base.search });
  const expectedOf = new Map(found.map(({ mask, expected }) => [maskBits(mask), expected]));
  return {
    ...state,
    pool,
    costs: await measureRows(context, rows, pool, 'compose'),
    expected: pool.map(({ mask }) => expectedOf.get(maskBits(mask))),
  };
}

/** Adds the mask for everybody in other sizes, measured on the same rows. */
async function withSizes(
  context: LearnMasksContext,
  rows: readonly SampledRow[],
  state: Searched,
): Promise<Searched> {
  const { bench, effort, prompts, track } = context;
  if (effort.sizes.length === 0) return state;
  track.onStage('sizes');
  const base = state.pool[state.base]!;
  const { searchPositions, triesMax } = effort.one;
  const found = await resizeMask(base.mask, {
    cost: bench.costOn('one sizes', prompts.everybody.search, searchPositions),
    ranking: state.pool[0]!.search.worth,
    budget: bench.budget,
    sizes: effort.sizes,
    evaluationsMax: effort.sizeExchanges,
    triesMax,
  });
  const pool = [...state.pool];
  for (const { size, mask } of found)
    addTo(pool, { mask, source: `${size} times as much`, search: base.search });
  if (pool.length === state.pool.length) return state;
  return {
    ...state,
    pool,
    costs: await measureRows(context, rows, pool, 'sizes'),
    skipped: pool.map(({ mask }) => weightSkipped(mask, bench.budget)),
  };
}

/** Numbers of the group's clusters. */
type Group = readonly number[];

/** The first groups: clusters whose centroids are near each other. */
function groupsByMeaning({ clusters }: Prompts, groupCount: number, seed: number): Group[] {
  const points = centroidPoints(clusters);
  const clusterCount = Math.min(groupCount, points.count);
  return groupsBy(kMeans(points, { clusterCount, seed }).assignment);
}

/**
 * Names a group by content, so that an equal group of another turn, or of a run with other cluster numbers, is
 * recognised as searched.
 */
const nameOf = ({ clusters: { sizes, centroids } }: Prompts, group: Group): string =>
  `group ${contentKey([sizes.length, Array.from(centroids.subarray(0, 8)), group]).slice(0, 16)}`;

/** Masks to start a group's search from: its present mask first, if its clusters share one. */
function startsFor({ pool, costs, base }: Searched, group: Group): [Mask, ...Mask[]] {
  const own = bestForAll(
    costs.filter(({ cluster }) => group.includes(cluster)),
    base,
  );
  return own === base ? [pool[base]!.mask] : [pool[own]!.mask, pool[base]!.mask];
}

async function searchGroup(
  context: LearnMasksContext,
  group: Group,
  starts: readonly [Mask, ...Mask[]],
  ranking: readonly number[],
): Promise<FoundMask[]> {
  const { bench, prompts, effort } = context;
  const rows = prompts.everybody.search.filter((row) => group.includes(prompts.clusterOf.get(row)!));
  if (!isScorable(context, rows)) return [];
  const name = nameOf(prompts, group);
  const search = await searchGroupMask(bench, name, rows, starts, ranking, effort.group);
  const of = group.length === 1 ? `cluster ${group[0]}` : `${group.length} clusters`;
  // Every mask in the pool is scored on every prompt of the assignment, and gates without exchanges are never the best.
  return search.proposals
    .filter(({ source }) => source !== 'gates')
    .map(({ mask, source }) => ({ mask, source: `${source} on ${of}`, search }));
}

/** Adds a mask unless the pool has it already. */
function addTo(pool: FoundMask[], found: FoundMask): void {
  if (pool.some(({ mask }) => maskBits(mask) === maskBits(found.mask))) return;
  pool.push(found);
}

async function measureRows(
  { score, track, prompts, atOnce }: LearnMasksContext,
  rows: readonly SampledRow[],
  pool: readonly FoundMask[],
  stage: 'share' | 'compose' | 'sizes' = 'share',
): Promise<RowCosts[]> {
  const masks = pool.map(({ mask }) => mask);
  track.onStage(stage, { results: rows.length });
  return mapAtOnce(rows, atOnce, async ({ row, sample }): Promise<RowCosts> => {
    const scores = await score(sample, masks);
    track.onResult();
    return {
      cluster: prompts.clusterOf.get(row)!,
      positions: scores[0]!.positions,
      kl: scores.map(({ kl }) => kl),
    };
  });
}

export const isScorable = ({ texts }: LearnMasksContext, rows: readonly CalibrationRow[]): boolean =>
  texts.draw('scorable', rows, 1).length > 0;
