/** A contestant is a method at a sparsity: its masks for each scored row, and the row of figures that follows. */
import { denseMask, type Mask, sparsity } from '../../../shared/mask/mask.ts';
import { average } from '../../measure.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { weightsRead } from '../../model/weights-file.ts';
import { bootstrapInterval, weightedRatio } from '../search/bootstrap.ts';
import { countsOf } from '../search/budget.ts';
import type { SampleScores } from '../search/score-masks.ts';
import { addScores, figuresOf, scoresBy } from '../search/score-masks.ts';
import type { EvaluationRow, Method } from './result.ts';
import type { Timer } from './timing.ts';

export type Contestant = {
  readonly method: Method;
  readonly matched: 'count' | 'time';
  readonly maskSet: string | null;
  readonly clusters: number;
  readonly targetSparsity: number;
  readonly surrogate: boolean;
  readonly evaluations: number | null;
  /** The masks of each scored row; where there are several, their scores are averaged. */
  readonly masks: readonly (readonly Mask[])[];
};

type ScoredRow = { readonly kind: string };

/** `scores[row]`: one sum of scores for each of the row's masks. */
export function toRow(
  contestant: Contestant,
  scoredRows: readonly ScoredRow[],
  scores: readonly (readonly SampleScores[])[],
  timer: Pick<Timer, 'msOf' | 'spreadOf'>,
  config: ModelConfig,
): EvaluationRow {
  const { masks, method, matched, maskSet, clusters, targetSparsity, surrogate, evaluations } = contestant;
  const mean = (value: (mask: Mask) => number) => average(masks.map((some) => average(some.map(value))));
  const perRow = scores.map(meanScores);
  const total = addScores(perRow);
  const dense = weightsRead(config, denseMask(2 * config.layerCount));
  return {
    method,
    matched,
    maskSet,
    clusters,
    targetSparsity,
    surrogate,
    evaluations,
    sparsity: mean(sparsity),
    ...figuresOf(total),
    msPerToken: mean(timer.msOf),
    msPerTokenSpread: [mean((mask) => timer.spreadOf(mask)[0]), mean((mask) => timer.spreadOf(mask)[1])],
    attention: mean((mask) => countsOf(mask).attention),
    ffn: mean((mask) => countsOf(mask).ffn),
    skippedWeightShare: mean((mask) => 1 - weightsRead(config, mask) / dense),
    rows: perRow.length,
    positions: total.positions,
    intervals: intervalsOf(perRow),
    byKind: byKind(scoredRows, perRow),
  };
}

/** Scores of one row under several masks: their mean. */
function meanScores(parts: readonly SampleScores[]): SampleScores {
  const total = addScores(parts);
  return scoresBy((name) => total[name] / parts.length);
}

function intervalsOf(rows: readonly SampleScores[]): EvaluationRow['intervals'] {
  const positions = rows.map((row) => row.positions);
  const of = (value: (row: SampleScores) => number, map = (mean: number) => mean) => {
    const values = rows.map(value);
    return bootstrapInterval(rows.length, (weights) => map(weightedRatio(weights, values, positions)));
  };
  return {
    kl: of(({ kl }) => kl),
    agreement: of(({ equalTops }) => equalTops),
    perplexity: of(({ loss }) => loss, Math.exp),
  };
}

function byKind(scoredRows: readonly ScoredRow[], scores: readonly SampleScores[]): EvaluationRow['byKind'] {
  const kinds = Map.groupBy(scores.keys(), (row) => scoredRows[row]!.kind);
  return Object.fromEntries(
    [...kinds].map(([kind, rows]) => {
      const total = addScores(rows.map((row) => scores[row]!));
      return [kind, { rows: rows.length, positions: total.positions, ...figuresOf(total) }];
    }),
  );
}
