/**
 * How far a mask moves the serving engine's model: KL(dense ‖ masked) in nats, equal top tokens, and the cost of the text
 * itself, over the whole vocabulary. Samples give sums, so that any set of them can be pooled and resampled.
 *
 * The runtime computes the distributions: six times as fast as loops in JavaScript, and the largest part of an evaluation
 * after the model itself.
 *
 * Shapes: P scored positions of a sample, R rows (positions), V tokens. For logits l with q = softmax(l), and the dense
 * model's p: log Σ exp l = max l − log max q; KL(p ‖ q) = Σ p log p − Σ p·l + log Σ exp l; the text's own token t costs
 * log Σ exp l − l_t.
 */
import { denseMask, type Mask } from '../../../shared/mask.ts';
import type { KvCache } from '../../engine/kv-cache.ts';
import type { Runner } from '../../engine/runner.ts';
import { encodeModel } from '../../onnx/encode.ts';
import { type Graph, GraphBuilder, type Value } from '../../onnx/graph.ts';
import { createSession, floats, type Session, tensor } from '../../onnx/session.ts';
import { type Sample, scoredPositions } from '../data/samples.ts';
import { integers } from '../gates/batches.ts';

/** Sums over the scored positions of a sample. */
export type SampleScores = {
  readonly positions: number;
  /** Nats. */
  readonly kl: number;
  readonly equalTops: number;
  /** −log-likelihood of the text, nats. */
  readonly loss: number;
};

/** A sample under the dense model. */
export type Reference = {
  readonly sample: Sample;
  /** `[P, V]`. */
  readonly probabilities: Float32Array;
  /** Σ p log p, `[P]`. */
  readonly negentropies: Float32Array;
  readonly tops: Int32Array;
  readonly scores: SampleScores;
};

export type Scorer = {
  reference(sample: Sample): Promise<Reference>;
  score(reference: Reference, mask: Mask): Promise<SampleScores>;
};

/** One sequence at a time, in one cache. */
export function createScorer(runner: Runner, session: ScoreSession): Scorer {
  const cache = runner.newCache();
  const dense = denseMask(2 * runner.config.layerCount);
  return {
    async reference(sample) {
      const logits = await logitsOf(runner, cache, sample, dense);
      const positions = scoredPositions(sample);
      const { losses, tops } = await session.losses(logits, nextIds(sample));
      const distribution = await session.distribution(logits, positions);
      return {
        sample,
        ...distribution,
        tops,
        scores: { positions, kl: 0, equalTops: positions, loss: sum(losses) },
      };
    },
    async score({ sample, probabilities, negentropies, tops }, mask) {
      const logits = await logitsOf(runner, cache, sample, mask);
      const found = await session.against(logits, nextIds(sample), probabilities);
      let kl = 0;
      let equalTops = 0;
      negentropies.forEach((negentropy, row) => {
        // Rounding can put an equal distribution a hair below 0.
        kl += Math.max(0, negentropy - found.expectedLogits[row]! + found.logSums[row]!);
        if (found.tops[row] === tops[row]) equalTops++;
      });
      return { positions: tops.length, kl, equalTops, loss: sum(found.losses) };
    },
  };
}

/** `[P, V]`. */
function logitsOf(runner: Runner, cache: KvCache, sample: Sample, mask: Mask): Promise<Float32Array> {
  cache.length = 0;
  const logitRows = Array.from({ length: scoredPositions(sample) }, (_, i) => sample.scoreFrom + i);
  const tokenIds = sample.tokenIds.subarray(0, -1);
  return runner.run({ cache, tokenIds, logitRows, plan: { mask, kv: 'preserve' } });
}

const nextIds = ({ tokenIds, scoreFrom }: Sample): Int32Array => tokenIds.subarray(scoreFrom + 1);

const sum = (values: Float32Array): number => values.reduce((total, value) => total + value, 0);

export function addScores(parts: readonly SampleScores[]): SampleScores {
  const total = { positions: 0, kl: 0, equalTops: 0, loss: 0 };
  for (const part of parts) {
    total.positions += part.positions;
    total.kl += part.kl;
    total.equalTops += part.equalTops;
    total.loss += part.loss;
  }
  return total;
}

/** Means a position; perplexity is exp of the mean loss. */
export const figuresOf = ({ positions, kl, equalTops, loss }: SampleScores) => ({
  kl: kl / positions,
  agreement: equalTops / positions,
  perplexity: Math.exp(loss / positions),
});

/** What masks cost on prompts that they were not searched on, in the numbers that a mask set carries. */
export type HeldOutScores = {
  readonly positions: number;
  /** Mean over the positions, nats. */
  readonly kl: number;
  /** Share of positions whose most likely token is that of the dense model. */
  readonly agreement: number;
  readonly perplexity: number;
  readonly densePerplexity: number;
};

/** The scores of each mask over all samples. One sample at a time: a long set's dense distributions fill the memory. */
export async function scoreHeldOut(
  scorer: Scorer,
  samples: readonly Sample[],
  masks: readonly Mask[],
): Promise<HeldOutScores[]> {
  const dense: SampleScores[] = [];
  const masked = masks.map((): SampleScores[] => []);
  for (const sample of samples) {
    const reference = await scorer.reference(sample);
    dense.push(reference.scores);
    for (const [i, mask] of masks.entries()) masked[i]!.push(await scorer.score(reference, mask));
  }
  const { perplexity: densePerplexity } = figuresOf(addScores(dense));
  return masked.map((parts) => {
    const total = addScores(parts);
    return { positions: total.positions, ...figuresOf(total), densePerplexity };
  });
}

/** Weighted means; perplexities by their logarithms. Positions add up. */
export function poolScores(
  parts: readonly { readonly scores: HeldOutScores; readonly weight: number }[],
): HeldOutScores {
  const total = parts.reduce((sum, { weight }) => sum + weight, 0);
  const mean = (value: (scores: HeldOutScores) => number) =>
    parts.reduce((sum, { scores, weight }) => sum + (weight / total) * value(scores), 0);
  return {
    positions: parts.reduce((sum, { scores }) => sum + scores.positions, 0),
    kl: mean(({ kl }) => kl),
    agreement: mean(({ agreement }) => agreement),
    perplexity: Math.exp(mean(({ perplexity }) => Math.log(perplexity))),
    densePerplexity: Math.exp(mean((scores) => Math.log(scores.densePerplexity))),
  };
}

/* Distributions, in graphs of their own. */

type PositionScores = {
  /** −log q of the row's own next token, nats, `[R]`. */
  readonly losses: Float32Array;
  /** The likeliest token, the first of equals, `[R]`. */
  readonly tops: Int32Array;
  /** log Σ exp of the logits, `[R]`. */
  readonly logSums: Float32Array;
};

export type ScoreSession = {
  /** `logits`: `[R, V]`; `nextIds`: `[R]`. @throws RangeError on logits that are no numbers. */
  losses(logits: Float32Array, nextIds: ArrayLike<number>): Promise<PositionScores>;
  /** The same, and Σ p·l of every row, where `probabilities` is `[R, V]`. */
  against(
    logits: Float32Array,
    nextIds: ArrayLike<number>,
    probabilities: Float32Array,
  ): Promise<PositionScores & { readonly expectedLogits: Float32Array }>;
  /** softmax of every row, and Σ p log p. */
  distribution(
    logits: Float32Array,
    rows: number,
  ): Promise<{ probabilities: Float32Array; negentropies: Float32Array }>;
  close(): Promise<void>;
};

export async function openScoreSession(threads: number): Promise<ScoreSession> {
  const open = (graph: Graph) => createSession(encodeModel(graph), { threads });
  const [plain, compare, softmax] = await Promise.all([
    open(scoreGraph(false)),
    open(scoreGraph(true)),
    open(softmaxGraph()),
  ]);
  const sessions: Session[] = [plain, compare, softmax];
  return {
    async losses(logits, nextIds) {
      return positionScores(await plain.run(feedsOf(logits, nextIds), ['losses', 'tops', 'log_sums']));
    },
    async against(logits, nextIds, probabilities) {
      const R = nextIds.length;
      const feeds = {
        ...feedsOf(logits, nextIds),
        probabilities: tensor('f32', probabilities, [R, logits.length / R]),
      };
      const outputs = await compare.run(feeds, ['losses', 'tops', 'log_sums', 'expected_logits']);
      return { ...positionScores(outputs), expectedLogits: floats(outputs.expected_logits!) };
    },
    async distribution(logits, rows) {
      const outputs = await softmax.run({ logits: tensor('f32', logits, [rows, logits.length / rows]) }, [
        'probabilities',
        'negentropies',
      ]);
      return {
        probabilities: floats(outputs.probabilities!),
        negentropies: floats(outputs.negentropies!),
      };
    },
    async close() {
      for (const session of sessions) await session.release();
    },
  };
}

function feedsOf(logits: Float32Array, nextIds: ArrayLike<number>) {
  const R = nextIds.length;
  return {
    logits: tensor('f32', logits, [R, logits.length / R]),
    next_ids: integers(nextIds, [R, 1]),
  };
}

function positionScores(outputs: Awaited<ReturnType<Session['run']>>): PositionScores {
  const logSums = floats(outputs.log_sums!);
  if (!logSums.every(Number.isFinite))
    throw new RangeError('the model gave logits that are not finite numbers');
  return {
    losses: floats(outputs.losses!),
    tops: Int32Array.from(outputs.tops!.data as BigInt64Array, Number),
    logSums,
  };
}

function scoreGraph(compare: boolean): Graph {
  const g = new GraphBuilder('scores');
  const logits = g.input('logits', 'f32', ['R', 'V']);
  const nextIds = g.input('next_ids', 'i64', ['R', 1]);
  const flat = (value: Value, name: string) => {
    g.node('Reshape', [value, g.constant('i64', [1], [-1])], [name]);
    g.output({ name }, 'f32', ['R']);
  };
  const axes = g.constant('i64', [1], [-1]);
  const most = (value: Value) => g.op('ReduceMax', [value, axes], { keepdims: 1 });
  const logSum = g.op('Sub', [most(logits), g.op('Log', [most(g.op('Softmax', [logits], { axis: -1 }))])]);
  flat(g.op('Sub', [logSum, g.op('GatherElements', [logits, nextIds], { axis: 1 })]), 'losses');
  flat(g.op('Identity', [logSum]), 'log_sums');
  g.node('ArgMax', [logits], ['tops'], { axis: -1, keepdims: 0 });
  g.output({ name: 'tops' }, 'i64', ['R']);
  if (compare) flat(rowProducts(g, g.input('probabilities', 'f32', ['R', 'V']), logits), 'expected_logits');
  return g.graph;
}

function softmaxGraph(): Graph {
  const g = new GraphBuilder('softmax');
  const logits = g.input('logits', 'f32', ['R', 'V']);
  g.node('Softmax', [logits], ['probabilities'], { axis: -1 });
  g.output({ name: 'probabilities' }, 'f32', ['R', 'V']);
  const logs = g.op('LogSoftmax', [logits], { axis: -1 });
  const products = rowProducts(g, { name: 'probabilities' }, logs);
  g.node('Reshape', [products, g.constant('i64', [1], [-1])], ['negentropies']);
  g.output({ name: 'negentropies' }, 'f32', ['R']);
  return g.graph;
}

/** Σ_v a·b of every row, as one batch of dot products: `[R, 1, 1]`. */
const rowProducts = (g: GraphBuilder, a: Value, b: Value): Value =>
  g.op('MatMul', [
    g.op('Unsqueeze', [a, g.constant('i64', [1], [1])]),
    g.op('Unsqueeze', [b, g.constant('i64', [1], [2])]),
  ]);
