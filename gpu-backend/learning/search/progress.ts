/**
 * Progress of a learning run: the stage, and how much of the stage and of the whole work is done. Work is counted in
 * tokens that the model computes, estimated from what stages usually take. A stage that takes less or more than
 * estimated changes only the remaining work.
 */
import { type LearnEffort, STEP_PARTS, searchResults } from './effort.ts';

type MaskStage = 'one mask' | 'masks' | 'share' | 'compose' | 'sizes' | 'measure';

/** `number` of `count`, from 1. */
type StageNumber = { readonly number: number; readonly count: number };

/** Work in tokens. */
type Work = {
  readonly done: number;
  readonly total: number;
  /** Work read from the journal of a resumed run; it says nothing about the speed. */
  readonly known: number;
};

export type LearnProgress = { readonly at: StageNumber } & (
  | { readonly stage: 'read' | 'embed' }
  | {
      readonly stage: MaskStage;
      readonly done: number;
      readonly total: number;
      readonly unit: string;
      /** The group of clusters that is worked on. */
      readonly group: number | undefined;
      readonly work: Work;
    }
);

/** What is known of a run before it starts. */
type RunSize = {
  readonly blocks: number;
  /** Groups of clusters for which masks are searched; 1: one mask for all. */
  readonly groups: number;
  /** Known masks of an earlier set, if none are searched; else 0. */
  readonly known: number;
  /** Tokens of a batch that masks are searched on. */
  readonly batchTokens: number;
  readonly shareRows: number;
  /** Prompts that single blocks are changed for. */
  readonly composeRows: number;
  readonly heldOutRows: number;
  /** Mean tokens of a prompt. */
  readonly rowTokens: number;
};

type PlannedStage = {
  readonly stage: MaskStage;
  readonly results: number;
  /** Mean tokens of one result. */
  readonly tokens: number;
};

/** Usual share of a race's results: most races end early. */
const USUAL_PART = 0.6;
/** A part of a training step has half a batch's tokens, and a gradient takes as long as two passes forward. */
const STEP_BATCHES = 1.5;
/** A race goes on to the next batch while it leads. */
const BATCHES_A_GLANCE = 1.2;
/**
 * Work of a scored token: a prompt is scored alone and over the whole vocabulary, which takes twice as long as the loss
 * of a batch.
 */
const SCORED_TOKEN = 2;
/** Masks measured in addition: the dense model, and one mask with 1, 2, 3 blocks returned. */
const MEASURED_BESIDE = 4;
/** Share of the prompts' work: half are scored with each block changed, the others under the fewer composed masks. */
const COMPOSED_PART = 0.8;
/** Masks that the search for everybody (`one`) and the search for a group add to the pool. */
const FOUND_BY = { one: 5, group: 3 };

/** Stages in order, with their usual work. */
export function planStages(effort: LearnEffort, size: RunSize): PlannedStage[] {
  const { groups, known } = size;
  const rowTokens = SCORED_TOKEN * size.rowTokens;
  const one = usualSearch(effort, 'one', size);
  const group = usualSearch(effort, 'group', size);
  const share = (masks: number) => ({
    stage: 'share' as const,
    results: size.shareRows,
    tokens: (masks + 1) * rowTokens,
  });
  const turns = Array.from({ length: groups > 1 ? effort.turns : 0 }, (_, turn): PlannedStage[] => {
    const fresh = FOUND_BY.group * groups + (turn === 0 ? FOUND_BY.one : 0);
    return [{ stage: 'masks', results: groups * group.results, tokens: group.tokens }, share(fresh)];
  });
  const composed = {
    results: size.composeRows + size.shareRows,
    tokens: COMPOSED_PART * effort.compose.blocks * rowTokens,
  };
  const sizes = sizesOf(effort, groups);
  const resized = usualSearch(effort, 'size', size);
  const sized = { results: sizes * resized.results + size.shareRows, tokens: resized.tokens };
  const few = groups + effort.compose.masks / 2;
  const measured = groups > 1 ? few + sizes + MEASURED_BESIDE : 2;
  return [
    { stage: 'one mask', ...one },
    ...(known > 0 && groups > 1 ? [share(known)] : turns.flat()),
    ...(composes(effort, groups) ? [{ stage: 'compose' as const, ...composed }] : []),
    ...(sizes === 0 ? [] : [{ stage: 'sizes' as const, ...sized }]),
    { stage: 'measure', results: size.heldOutRows, tokens: measured * rowTokens },
  ];
}

const composes = ({ compose }: LearnEffort, groups: number): boolean => groups > 1 && compose.masks > 0;

/** Number of other sizes of the mask for everybody; 0 with one mask for all. */
const sizesOf = ({ sizes }: LearnEffort, groups: number): number => (groups > 1 ? sizes.length : 0);

function usualSearch(effort: LearnEffort, which: 'one' | 'group' | 'size', { blocks, batchTokens }: RunSize) {
  const { glanceParts, gateSteps } = which === 'size' ? { glanceParts: 1, gateSteps: 0 } : effort[which];
  const steps = STEP_PARTS * gateSteps;
  const others = Math.max(1, Math.round(USUAL_PART * (searchResults(effort, blocks)[which] - steps)));
  const batches = steps * STEP_BATCHES + others * glanceParts * BATCHES_A_GLANCE;
  const results = steps + others;
  return { results, tokens: (batches * batchTokens) / results };
}

/** The first stages: reading and embedding. */
const FIRST_STAGES = 2;

/** Number of a stage that comes before the search for masks. */
export const firstStage = (number: 1 | 2, effort: LearnEffort, groups: number): StageNumber => ({
  number,
  count:
    FIRST_STAGES +
    (groups > 1 ? Math.max(1, 2 * effort.turns) : 0) +
    (sizesOf(effort, groups) > 0 ? 1 : 0) +
    (composes(effort, groups) ? 1 : 0) +
    2,
});

export type ProgressTracker = {
  /**
   * @param results results still to come in the stage, if known.
   * @param group number of the group that is searched now, of `groups`.
   */
  onStage(stage: MaskStage, now?: { results?: number; group?: number; groups?: number }): void;
  onResult(): void;
};

/** `journalSize`: number of results in the journal. While it does not grow, a resumed run only reads results. */
export function trackProgress(
  onProgress: (progress: LearnProgress) => void,
  plan: readonly PlannedStage[],
  journalSize: () => number,
): ProgressTracker {
  const stages = plan.map((stage) => ({ ...stage, planned: stage.results, done: 0 }));
  const sizeBefore = journalSize();
  let at = { index: 0, group: undefined as number | undefined };
  let known = 0;
  const workOf = (value: 'done' | 'results') =>
    stages.reduce((sum, stage) => sum + stage[value] * stage.tokens, 0);
  const report = () => {
    const { stage, done, results } = stages[at.index]!;
    const work = { done: workOf('done'), total: workOf('results') };
    if (journalSize() === sizeBefore) known = work.done;
    onProgress({
      stage,
      done,
      total: results,
      unit: stage === 'share' ? 'prompts' : 'results',
      group: at.group,
      at: { number: FIRST_STAGES + at.index + 1, count: FIRST_STAGES + stages.length },
      work: { ...work, known },
    });
  };
  return {
    onStage(stage, { results, group, groups = 1 } = {}) {
      // Turns have equal stages: the first group of a later turn begins the next one.
      const from = group === 0 && stages[at.index]!.stage === stage ? at.index + 1 : at.index;
      const found = stages.findIndex((planned, i) => i >= from && planned.stage === stage);
      const index = found < 0 ? at.index : found;
      // Finished stages keep their actual work; skipped stages count as 0.
      for (const past of stages.slice(0, index)) past.results = past.done;
      at = { index, group };
      const current = stages[index]!;
      if (results !== undefined) current.results = current.done + results;
      else if (group !== undefined)
        current.results = current.done + Math.round(((groups - group) * current.planned) / groups);
      report();
    },
    onResult() {
      const stage = stages[at.index]!;
      stage.done++;
      if (stage.done > stage.results) stage.results = stage.done;
      report();
    },
  };
}
