/** An evaluation as `evaluate` writes it, made up but of the real shape: learned masks beside some baselines. */
import type { Evaluation, EvaluationRow } from '../../gpu-backend/learning/evaluation/result.ts';

type Figures = readonly [kl: number, agreement: number, perplexity: number, msPerToken: number];

/** `version`: of the set that was evaluated. */
export function madeUpEvaluation(version: string): Evaluation {
  const row = (
    method: EvaluationRow['method'],
    [kl, agreement, perplexity, msPerToken]: Figures,
    more: Partial<EvaluationRow> = {},
  ): EvaluationRow => ({
    method,
    matched: 'count',
    maskSet: null,
    clusters: 1,
    targetSparsity: 0.125,
    sparsity: 0.117,
    surrogate: true,
    kl,
    agreement,
    perplexity,
    msPerToken,
    attention: 3,
    ffn: 4,
    skippedWeightShare: 0.11,
    evaluations: 300,
    rows: 64,
    positions: 4000,
    intervals: { kl: [0.9 * kl, 1.1 * kl], agreement: null, perplexity: null },
    byKind: { math: { rows: 64, positions: 4000, kl, agreement, perplexity } },
    ...more,
  });
  return {
    rows: [
      row('dense', [0, 1, 22.8, 5.9], { targetSparsity: 0, sparsity: 0, attention: 0, ffn: 0 }),
      row('learned', [0.26, 0.78, 25.6, 5.2], { maskSet: version, clusters: 8 }),
      row('one-mask', [0.28, 0.77, 25.8, 5.2], { maskSet: version }),
      row('shortgpt', [0.61, 0.66, 36.4, 5.15]),
      row('sleb', [0.44, 0.71, 30.2, 5.22]),
      row('blockpruner', [0.33, 0.75, 27.1, 5.41]),
      row('finercut', [0.3, 0.76, 26.4, 5.46]),
      row('llm-drop', [0.35, 0.74, 26.9, 5.62]),
      row('last-k', [1.42, 0.47, 71.5, 5.14]),
      row('random', [1.05, 0.55, 55.3, 5.25]),
      row('finercut', [0.52, 0.68, 33.9, 5.44], { surrogate: false }),
      row('last-k', [2.31, 0.35, 148, 5.1], { surrogate: false }),
    ],
    equalTime: [
      row('finercut', [0.41, 0.72, 28.9, 5.19], { matched: 'time', maskSet: version, sparsity: 0.15 }),
      row('blockpruner', [0.38, 0.73, 28.1, 5.2], { matched: 'time', maskSet: version, sparsity: 0.15 }),
    ],
    headroom: [],
    routing: [{ maskSet: version, name: 'made-up', kinds: [{ kind: 'math', counts: [8, 56] }] }],
    data: { read: 200, repeated: 0, calibrating: 100, learnedOn: 0, left: 100 },
    notes: [],
    model: 'smollm2-135m-instruct',
    weights: 'q8',
    threads: 2,
    seed: 1,
    search: { evaluations: 300, positions: 384 },
  };
}
