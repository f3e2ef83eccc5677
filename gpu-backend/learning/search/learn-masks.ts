/**
 * From clusters of prompts to their masks. One mask is learned on all prompts. Then masks are searched for groups of
 * clusters and assigned to clusters, in turns (`search-in-turns.ts`), and as many masks are kept as pay off. If they
 * are not better than one mask on held-out prompts, all clusters share the mask for everybody.
 */
import type { Headroom } from '../../../shared/mask/held-out.ts';
import { denseMask, type Mask } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { centroidPoints } from '../data/clusters.ts';
import { mapAtOnce } from '../units/units.ts';
import { type Budget, weightSkipped } from './budget.ts';
import type { LearnEffort } from './effort.ts';
import { lighterMasks } from './exchange.ts';
import { headroomOf, leads } from './headroom.ts';
import type { SampleScores } from './score-masks.ts';
import { type FoundMask, isScorable, type LearnMasksContext, searchInTurns } from './search-in-turns.ts';
import { type Candidate, compareMasks, rankBlocks, searchOneMask } from './search-masks.ts';
import {
  countThatPays,
  type RowCosts,
  type Sharing,
  shareMasks,
  type Validated,
  validateCounts,
} from './share-masks.ts';

export type LearnedMasks = {
  /** The masks in use; the mask for everybody first. */
  readonly masks: readonly FoundMask[];
  /** The mask of each cluster, an index into `masks`. */
  readonly clusters: readonly number[];
  /** What the mask for everybody was chosen from, by rising KL. */
  readonly candidates: readonly Candidate[];
  readonly sharing: SharingFigures | undefined;
  readonly heldOut: readonly HeldOutRow[];
  /** The mask for everybody with 1, 2, … blocks returned. */
  readonly lighter: readonly Mask[];
};

/** How masks were assigned to clusters; undefined with a single cluster. */
export type SharingFigures = {
  /** Turns of searching and assigning, and rows that were measured. */
  readonly turns: number;
  readonly rows: number;
  /** All candidate masks, with their KL over all of these rows. */
  readonly pool: readonly Candidate[];
  /** Figures of 1, 2, … masks (`validateCounts`). */
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

const whyNone = ({ scored, tokensMax }: LearnEffort): string =>
  scored === 'answers'
    ? `Of each row, beside its system prompt, the first ${tokensMax} tokens are read, and no answer begins there: learn without --score answers, or with shorter prompts.`
    : 'No row is long enough to score a mask on.';

/** @throws MaskrouteError `invalid_data` when no row is long enough to score a mask on. */
export async function learnMasks(context: LearnMasksContext): Promise<LearnedMasks> {
  const { everybody, clusters } = context.prompts;
  context.track.onStage('one mask');
  if (!isScorable(context, everybody.search))
    throw new MaskrouteError('invalid_data', whyNone(context.effort));
  const { one, candidates } = await learnOne(context);
  const clusterCount = clusters.sizes.length;
  if (clusterCount === 1) {
    const heldOut = await measureHeldOut(context, [one.mask], [0], []);
    return {
      masks: [one],
      clusters: [0],
      candidates,
      sharing: undefined,
      lighter: [],
      heldOut: heldOut.rows,
    };
  }
  return { ...(await learnShared(context, one)), candidates };
}

async function learnOne({ bench, prompts, effort, known }: LearnMasksContext) {
  const { search: rows } = prompts.everybody;
  const search =
    known === undefined
      ? await searchOneMask(bench, rows, effort.one)
      : await rankBlocks(bench, rows, known, effort.one);
  const on = bench.costOn('one choice', prompts.everybody.choice, effort.choicePositions);
  // A known mask for everybody was chosen on more text before, so it is kept.
  const choices = known === undefined ? search.proposals : search.proposals.slice(0, 1);
  const candidates = await compareMasks(choices, on.ofMask);
  const [{ mask, source }] = candidates as [Candidate, ...Candidate[]];
  return { one: { mask, source, search }, candidates };
}

async function learnShared(
  context: LearnMasksContext,
  one: FoundMask,
): Promise<Omit<LearnedMasks, 'candidates'>> {
  const { bench, prompts, maskCount } = context;
  const clusterCount = prompts.clusters.sizes.length;
  const { pool, costs, turns, base, skipped, expected } = await searchInTurns(context, one);
  const { masksMax, compose, sizes: sizesTried } = context.effort;
  const tried = masksMax + compose.masks + (skipped ? sizesTried.length : 0);
  const most = Math.min(maskCount ?? tried, pool.length);
  const centroids = centroidPoints(prompts.clusters);
  const sizes = skipped && { skipped, centroids, prompts: prompts.clusters.sizes };
  const options = { clusterCount, base, sizes, expected, maskCount: most };
  const validated = validateCounts(costs, options, bench.seed);
  const wanted = maskCount ?? countThatPays(validated);
  // Even where one mask is best, several are assigned, to report their headroom.
  const sharing = shareMasks(costs, { ...options, maskCount: wanted > 1 ? Math.min(wanted, most) : most });
  const masks = sharing.masks.map((index) => pool[index]!);
  const clusters = sharing.clusters.map((index) => sharing.masks.indexOf(index));
  context.track.onStage('measure');
  const lighter = masks.length > 1 ? await lighterOf(context, masks[0]!.mask) : [];
  const measured = await measureHeldOut(
    context,
    masks.map(({ mask }) => mask),
    clusters,
    lighter,
  );
  const reason = whyOneMask(maskCount, wanted, sharing, measured.headroom);
  const figures: SharingFigures = {
    turns,
    rows: costs.length,
    validated,
    headroom: measured.headroom,
    reason,
    pool: costs.length === 0 ? [] : candidatesOn(pool, costs),
  };
  if (reason === null) return { masks, clusters, sharing: figures, heldOut: measured.rows, lighter };
  return {
    masks: masks.slice(0, 1),
    clusters: clusters.map(() => 0),
    sharing: figures,
    lighter,
    heldOut: measured.rows.map((row) => ({ ...row, learned: row.one })),
  };
}

/** By rising KL over all rows. */
function candidatesOn(pool: readonly FoundMask[], costs: readonly RowCosts[]): Candidate[] {
  const positions = costs.reduce((sum, row) => sum + row.positions, 0);
  const klOf = (index: number) => costs.reduce((sum, { kl }) => sum + kl[index]!, 0) / positions;
  return pool
    .map(({ mask, source }, index) => ({ mask, source, kl: klOf(index) }))
    .sort((a, b) => a.kl - b.kl);
}

/**
 * Why all clusters share one mask; null if they do not. `asked`: requested number of masks, if any; `wanted`: the
 * number that pays off.
 */
function whyOneMask(
  asked: number | undefined,
  wanted: number,
  { masks }: Sharing,
  headroom: Headroom | undefined,
): string | null {
  if (asked === 1) return 'one mask was asked for';
  if (masks.length === 1) return 'no other mask suits any cluster better';
  if (wanted === 1)
    return 'no number of masks led one mask by more than its error on prompts that did not choose them';
  if (headroom === undefined) return 'no prompt is held out to confirm on that several masks lead one';
  if (leads(headroom)) return null;
  const { mean_kl, standardError_kl } = headroom.lead;
  const error =
    standardError_kl === null ? 'a single prompt' : `a standard error of ${standardError_kl.toFixed(4)}`;
  const nats = `${Math.abs(mean_kl).toFixed(4)} nats`;
  const change = mean_kl < 0 ? `added ${nats} to` : `took ${nats} off`;
  return `routing among ${masks.length} masks ${change} the KL of ${headroom.rows} held-out prompts, with ${error}`;
}

/* Held-out prompts. */

/** How many lighter masks are measured to express routing's gain in blocks. */
const LIGHTER_STEPS = 3;

/** The mask for everybody with ever more blocks returned: first those that lower the KL most for their weight. */
async function lighterOf({ bench, prompts, effort }: LearnMasksContext, one: Mask): Promise<Mask[]> {
  const on = bench.costOn('one lighter', prompts.everybody.choice, effort.choicePositions);
  return lighterMasks(one, bench.budget, LIGHTER_STEPS, on.atAGlance);
}

/** @param clusters the mask of each, an index into `masks`; the first is for everybody. */
async function measureHeldOut(
  { bench, prompts, texts, effort, score, track, atOnce }: LearnMasksContext,
  masks: readonly Mask[],
  clusters: readonly number[],
  lighter: readonly Mask[],
) {
  const drawn = texts.draw('held-out', prompts.everybody.heldOut, effort.heldOutPositions);
  track.onStage('measure', { results: drawn.length });
  const dense = denseMask(masks[0]!.runs.length);
  const rows = await mapAtOnce(drawn, atOnce, async ({ row, sample }) => {
    const [reference, ...under] = await score(sample, [dense, ...masks, ...lighter]);
    const cluster = prompts.clusterOf.get(row)!;
    const learned = under[clusters[cluster]!]!;
    track.onResult();
    return { cluster, kind: row.kind, dense: reference!, learned, one: under[0]!, under };
  });
  const headroom =
    masks.length === 1 || rows.length === 0
      ? undefined
      : headroomOf(
          rows.map(({ cluster, kind, dense: { positions }, under }) => ({
            kind,
            positions,
            routed: clusters[cluster]!,
            kl: under.slice(0, masks.length).map(({ kl }) => kl),
            klEven: under.slice(0, masks.length).map(({ klEven }) => klEven),
            lighter: under.slice(masks.length).map(({ kl }) => kl),
          })),
          { masks: skippedBy(masks, bench.budget), lighter: skippedBy(lighter, bench.budget) },
        );
  return {
    rows: rows.map(({ cluster, dense, learned, one }) => ({ cluster, dense, learned, one })),
    headroom,
  };
}

const skippedBy = (masks: readonly Mask[], budget: Budget): number[] =>
  masks.map((mask) => weightSkipped(mask, budget));
