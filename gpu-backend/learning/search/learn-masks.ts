/**
 * From clusters of prompts to the mask of each. One mask is learned on everything. Then, as in k-means with a mask in the
 * place of a mean: masks are searched for groups of clusters, and every cluster goes to the mask that measures best on
 * prompts of its own that no search saw; in turns, until nothing changes. Held-out prompts say whether that leads one
 * mask; when it does not, all clusters share the mask for everybody.
 */
import { denseMask, type Mask, maskBits } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { kMeans } from '../data/kmeans.ts';
import type { Prompts } from '../data/prompt-groups.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { Sample, SampledRow } from '../data/samples.ts';
import { contentKey } from '../journal.ts';
import { type LearnEffort, searchResults, type trackProgress } from './effort.ts';
import { lighterMasks } from './exchange.ts';
import { type Headroom, headroomOf, leads } from './headroom.ts';
import type { SampleScores } from './score-masks.ts';
import type { Candidate, MaskSearch, Proposal } from './search-masks.ts';
import { compareMasks, searchGroupMask, searchOneMask } from './search-masks.ts';
import {
  bestForAll,
  countThatPays,
  type RowCosts,
  type Sharing,
  shareMasks,
  type Validated,
  validateCounts,
} from './share-masks.ts';
import type { TextMaker } from './texts.ts';
import type { Workbench } from './workbench.ts';

/** A mask that was found, by the search for everybody or for a group of clusters. */
export type FoundMask = Proposal & { readonly search: MaskSearch };

export type LearnedMasks = {
  /** Those in use; the mask for everybody first. */
  readonly masks: readonly FoundMask[];
  /** The mask of each cluster, an index into `masks`. */
  readonly clusters: readonly number[];
  /** What the mask for everybody was chosen from, by rising KL. */
  readonly candidates: readonly Candidate[];
  readonly sharing: SharingFigures | undefined;
  readonly heldOut: readonly HeldOutRow[];
  /** The mask for everybody with one block fewer out, two fewer, and so on. */
  readonly lighter: readonly Mask[];
};

/** How clusters were shared out; undefined with a single cluster. */
export type SharingFigures = {
  /** Turns of searching and sharing out, and rows that were measured. */
  readonly turns: number;
  readonly rows: number;
  /** All masks that competed, with their KL over all of those rows. */
  readonly pool: readonly Candidate[];
  /** Of 1, 2, … masks. */
  readonly validated: readonly Validated[];
  readonly headroom: Headroom | undefined;
  /** Why there is one mask for all clusters; null when there are several. */
  readonly reason: string | null;
};

export type HeldOutRow = {
  readonly cluster: number;
  readonly dense: SampleScores;
  /** Under the cluster's mask, and under the mask for everybody. */
  readonly learned: SampleScores;
  readonly one: SampleScores;
};

type LearnMasksContext = {
  readonly bench: Workbench;
  readonly prompts: Prompts;
  readonly texts: TextMaker;
  readonly effort: LearnEffort;
  /** How many masks; undefined: as many as pay. */
  readonly maskCount: number | undefined;
  readonly seed: number;
  /** Exact scores by the serving engine. */
  score(sample: Sample, masks: readonly Mask[]): Promise<SampleScores[]>;
  readonly track: ReturnType<typeof trackProgress>;
};

/** @throws MaskrouteError `invalid_data` when no row is long enough to score a mask on. */
export async function learnMasks(context: LearnMasksContext): Promise<LearnedMasks> {
  const { prompts, bench, effort } = context;
  const { everybody, clusters } = prompts;
  context.track.onStage('one mask', { results: searchResults(effort, bench.blockCount).one });
  if (!isScorable(context, everybody.search))
    throw new MaskrouteError('invalid_data', 'No row is long enough to score a mask on.');
  const { one, candidates } = await learnOne(context);
  const clusterCount = clusters.sizes.length;
  if (clusterCount === 1) {
    const heldOut = await measureHeldOut(context, [one.mask], [0], []);
    return {
      ...{ masks: [one], clusters: [0], candidates, sharing: undefined, lighter: [] },
      heldOut: heldOut.rows,
    };
  }
  return { ...(await learnShared(context, one)), candidates };
}

async function learnOne({ bench, prompts, effort }: LearnMasksContext) {
  const search = await searchOneMask(bench, prompts.everybody.search, effort.one);
  const on = bench.costOn('one choice', prompts.everybody.choice, effort.choicePositions);
  const candidates = await compareMasks(search.proposals, on.ofMask);
  const [{ mask, source }] = candidates as [Candidate, ...Candidate[]];
  return { one: { mask, source, search }, candidates };
}

async function learnShared(
  context: LearnMasksContext,
  one: FoundMask,
): Promise<Omit<LearnedMasks, 'candidates'>> {
  const { prompts, maskCount, seed } = context;
  const clusterCount = prompts.clusters.sizes.length;
  const { pool, costs, turns, base } = await searchInTurns(context, one);
  const most = Math.min(maskCount ?? context.effort.masksMax, pool.length);
  const options = { clusterCount, base, maskCount: most };
  const validated = validateCounts(costs, options, seed);
  const wanted = maskCount === undefined ? countThatPays(validated) : most;
  const sharing = shareMasks(costs, { ...options, maskCount: wanted });
  const masks = sharing.masks.map((index) => pool[index]!);
  const clusters = sharing.clusters.map((index) => sharing.masks.indexOf(index));
  const lighter = masks.length > 1 ? await lighterOf(context, masks[0]!.mask) : [];
  const measured = await measureHeldOut(
    context,
    masks.map(({ mask }) => mask),
    clusters,
    lighter,
  );
  const reason = whyOneMask(maskCount, sharing, validated, measured.headroom);
  const total = costs.reduce((sum, { positions }) => sum + positions, 0);
  const figures: SharingFigures = {
    ...{ turns, rows: costs.length, validated, headroom: measured.headroom, reason },
    pool: pool
      .map(({ mask, source }, i) => ({
        ...{ mask, source },
        kl: costs.reduce((sum, { kl }) => sum + kl[i]!, 0) / Math.max(1, total),
      }))
      .sort((a, b) => a.kl - b.kl),
  };
  if (reason === null) return { masks, clusters, sharing: figures, heldOut: measured.rows, lighter };
  return {
    masks: masks.slice(0, 1),
    clusters: clusters.map(() => 0),
    ...{ sharing: figures, lighter },
    heldOut: measured.rows.map((row) => ({ ...row, learned: row.one })),
  };
}

function whyOneMask(
  asked: number | undefined,
  { masks }: Sharing,
  validated: readonly Validated[],
  headroom: Headroom | undefined,
): string | null {
  if (masks.length === 1) {
    if (asked === 1) return 'one mask was asked for';
    return validated.length > 1
      ? 'no other mask took anything off the KL of prompts that did not choose it'
      : 'no other mask was found that suits some clusters better';
  }
  if (headroom === undefined) return 'no prompt is held out to confirm on that several masks lead one';
  if (leads(headroom)) return null;
  const { mean_kl, standardError_kl } = headroom.lead;
  const error =
    standardError_kl === null ? 'a single prompt' : `a standard error of ${standardError_kl.toFixed(4)}`;
  return (
    `routing among ${masks.length} masks took ${mean_kl.toFixed(4)} nats off the KL of ${headroom.rows} held-out ` +
    `prompts, with ${error}`
  );
}

/* Turns. */

type Searched = {
  readonly pool: readonly FoundMask[];
  readonly costs: readonly RowCosts[];
  readonly turns: number;
  /** The mask for everybody, an index into the pool. */
  readonly base: number;
};

async function searchInTurns(context: LearnMasksContext, one: FoundMask): Promise<Searched> {
  const { prompts, texts, effort, maskCount, seed } = context;
  const clusterCount = prompts.clusters.sizes.length;
  const most = maskCount ?? effort.masksMax;
  const rows = texts.draw('share', prompts.everybody.choice, effort.sharePositions);
  const pool = [one];
  for (const proposal of one.search.proposals) addTo(pool, { ...proposal, search: one.search });
  const searched = new Set<string>();
  let groups = groupsByMeaning(prompts, most, seed);
  let state: Searched = { pool: [one], costs: [], turns: 0, base: 0 };
  // One mask is known already.
  for (let turn = 1; turn <= effort.turns && most > 1; turn++) {
    const fresh = groups.filter((clusters) => !searched.has(nameOf(prompts, clusters)));
    if (fresh.length === 0) break;
    for (const [group, clusters] of fresh.entries()) {
      context.track.onStage('masks', {
        results: searchResults(effort, context.bench.blockCount).group,
        ...{ group, groups: fresh.length },
      });
      searched.add(nameOf(prompts, clusters));
      const starts = startsFor(state, clusters);
      for (const found of await searchGroup(context, clusters, starts, one.search.worth)) addTo(pool, found);
    }
    const masks = [...pool];
    const costs = await measureRows(context, rows, masks);
    const base = bestForAll(costs, 0);
    const sharing = shareMasks(costs, { clusterCount, base, maskCount: most });
    state = { pool: masks, costs, turns: turn, base };
    groups = groupsBy(sharing.clusters);
  }
  return state;
}

/** Clusters, by their numbers. */
type Group = readonly number[];

/** To begin with, clusters whose centroids are near each other. */
function groupsByMeaning({ clusters }: Prompts, groupCount: number, seed: number): Group[] {
  const { centroids, dimensions, sizes } = clusters;
  const points = { count: sizes.length, dimensions, values: centroids };
  const { assignment } = kMeans(points, { clusterCount: Math.min(groupCount, sizes.length), seed });
  return groupsBy(Array.from(assignment));
}

/** Clusters with equal labels, by rising label. */
function groupsBy(labels: readonly number[]): Group[] {
  const found = new Map<number, number[]>();
  labels.forEach((label, cluster) => {
    found.set(label, [...(found.get(label) ?? []), cluster]);
  });
  return [...found].sort(([a], [b]) => a - b).map(([, group]) => group);
}

/** By content: an equal group in another turn, or in a run with other numbers, has been searched already. */
const nameOf = ({ clusters: { sizes, centroids } }: Prompts, group: Group): string =>
  `group ${contentKey([sizes.length, Array.from(centroids.subarray(0, 8)), group]).slice(0, 16)}`;

/** The group's present mask first, where all its clusters share one. */
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
  // Each mask costs a run on every prompt that shares clusters out, and gates without exchanges win nowhere.
  return search.proposals
    .filter(({ source }) => source !== 'gates')
    .map(({ mask, source }) => ({ mask, source: `${source} on ${of}`, search }));
}

/** Each mask once, under its first name. */
function addTo(pool: FoundMask[], found: FoundMask): void {
  if (pool.some(({ mask }) => maskBits(mask) === maskBits(found.mask))) return;
  pool.push(found);
}

async function measureRows(
  { score, track, prompts }: LearnMasksContext,
  rows: readonly SampledRow[],
  pool: readonly FoundMask[],
): Promise<RowCosts[]> {
  const masks = pool.map(({ mask }) => mask);
  track.onStage('share', { results: rows.length });
  const costs: RowCosts[] = [];
  for (const { row, sample } of rows) {
    const scores = await score(sample, masks);
    costs.push({
      cluster: prompts.clusterOf.get(row)!,
      positions: scores[0]!.positions,
      kl: scores.map(({ kl }) => kl),
    });
    track.onResult();
  }
  return costs;
}

/* Held-out prompts. */

/** Steps back from one mask that tell what routing gains in blocks. */
const LIGHTER_STEPS = 3;

/** One mask with ever fewer blocks out: those first whose return takes most off the KL for what they weigh. */
async function lighterOf({ bench, prompts, effort }: LearnMasksContext, one: Mask): Promise<Mask[]> {
  const on = bench.costOn('one lighter', prompts.everybody.choice, effort.choicePositions);
  return lighterMasks(one, bench.budget, LIGHTER_STEPS, on.atAGlance);
}

/** @param clusters the mask of each, an index into `masks`; the first is for everybody. */
async function measureHeldOut(
  { prompts, texts, effort, score, track }: LearnMasksContext,
  masks: readonly Mask[],
  clusters: readonly number[],
  lighter: readonly Mask[],
) {
  const drawn = texts.draw('held-out', prompts.everybody.heldOut, effort.heldOutPositions);
  track.onStage('measure', { results: drawn.length });
  const dense = denseMask(masks[0]!.runs.length);
  const rows: (HeldOutRow & { kind: string; under: SampleScores[] })[] = [];
  for (const { row, sample } of drawn) {
    const [reference, ...under] = await score(sample, [dense, ...masks, ...lighter]);
    const cluster = prompts.clusterOf.get(row)!;
    const learned = under[clusters[cluster]!]!;
    rows.push({ cluster, kind: row.kind, dense: reference!, learned, one: under[0]!, under });
    track.onResult();
  }
  const headroom =
    masks.length === 1 || rows.length === 0
      ? undefined
      : headroomOf(
          rows.map(({ cluster, kind, dense: { positions }, under }) => ({
            ...{ kind, positions, routed: clusters[cluster]! },
            kl: under.slice(0, masks.length).map(({ kl }) => kl),
            lighter: under.slice(masks.length).map(({ kl }) => kl),
          })),
        );
  return {
    rows: rows.map(({ cluster, dense, learned, one }) => ({ cluster, dense, learned, one })),
    headroom,
  };
}

const isScorable = ({ texts }: LearnMasksContext, rows: readonly CalibrationRow[]): boolean =>
  texts.draw('scorable', rows, 1).length > 0;
