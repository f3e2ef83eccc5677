/**
 * Compares a masked model with the dense model on the serving engine, over the whole vocabulary: KL(dense ‖ masked) in
 * nats, agreement of top tokens, and the text's own loss. Each sample gives sums, so that any set of samples can be
 * pooled and resampled.
 *
 * Distributions, the largest part of an evaluation after the model itself, are computed by ONNX Runtime: loops in
 * JavaScript take several times as long.
 *
 * Shapes: P scored positions of a sample, R rows (positions), V tokens; q = softmax of the logits, p the dense model's.
 */
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { denseMask, type Mask, maskBits } from '../../../shared/mask/mask.ts';
import type { KvValues, SequenceCache } from '../../engine/kv-cache.ts';
import { openRunner } from '../../engine/runner.ts';
import type { Runner, RunnerOptions } from '../../engine/runner-interface.ts';
import { sumOf } from '../../measure.ts';
import type { InstalledModel } from '../../model/store.ts';
import { encodeModel } from '../../onnx/encode.ts';
import { type Graph, GraphBuilder, type Value } from '../../onnx/graph.ts';
import { createSession, floats, integers, type Session, tensor } from '../../onnx/session.ts';
import { type Sample, scoredPositions } from '../data/samples.ts';

/** Raised when the same model and samples give other scores. */
export const SCORES_VERSION = 3;

/** Sums over the scored positions of a sample. The order is that of a unit's result. */
export const sampleScoresSchema = z.strictObject({
  positions: z.int(),
  /** Nats. */
  kl: z.number(),
  /**
   * The part of `kl` at every other position, starting with the first: a mask chosen on one half can be judged on the
   * other.
   */
  klEven: z.number(),
  equalTops: z.number(),
  /** −log-likelihood of the text, nats. */
  loss: z.number(),
});
export type SampleScores = Readonly<z.infer<typeof sampleScoresSchema>>;

export const SCORE_FIGURES = sampleScoresSchema.keyof().options;

/** The scores that `figure` gives. */
export const scoresBy = (figure: (name: keyof SampleScores, index: number) => number): SampleScores =>
  Object.fromEntries(SCORE_FIGURES.map((name, index) => [name, figure(name, index)])) as SampleScores;

/** A sample under the dense model. */
export type Reference = {
  readonly sample: Sample;
  /** log p, `[P, V]`. */
  readonly logs: Float32Array;
  readonly tops: Int32Array;
  readonly scores: SampleScores;
};

export type Scorer = {
  reference(sample: Sample): Promise<Reference>;
  score(reference: Reference, mask: Mask): Promise<SampleScores>;
};

/** Cache of the prompts' common beginnings, under all masks. */
const BEGINNINGS_BYTES_MAX = 64 * 1024 * 1024;

/** The serving engine, and what compares its outputs. */
export type Scoring = {
  readonly runner: Runner;
  readonly session: ScoreSession;
  readonly scorer: Scorer;
  close(): Promise<void>;
};

/** `surrogates`: the table that the masks name, if any. */
export async function openScoring(
  { folder, manifest }: InstalledModel,
  options: Pick<RunnerOptions, 'threads' | 'device' | 'surrogates'>,
): Promise<Scoring> {
  await using opening = new AsyncDisposableStack();
  const runner = await openRunner(folder, manifest.config, options);
  opening.defer(() => runner.close());
  const session = await openScoreSession(options.threads);
  opening.defer(() => session.close());
  const opened = opening.move();
  return { runner, session, scorer: createScorer(runner, session), close: () => opened.disposeAsync() };
}

/** Scores one sequence at a time. */
export function createScorer(runner: Runner, session: ScoreSession): Scorer {
  const logitsOf = createForward(runner);
  const dense = denseMask(2 * runner.config.layerCount);
  return {
    async reference(sample) {
      const logits = await logitsOf(sample, dense);
      const { losses, tops, logs } = await session.logs(logits, nextIds(sample));
      const positions = tops.length;
      const equal = { positions, kl: 0, klEven: 0, equalTops: positions };
      return { sample, logs, tops, scores: { ...equal, loss: sumOf(losses) } };
    },
    async score({ sample, logs, tops }, mask) {
      const logits = await logitsOf(sample, mask);
      const found = await session.against(logits, nextIds(sample), logs);
      // Rounding can make the KL of equal distributions slightly negative.
      const kls = found.kls.map((kl) => Math.max(0, kl));
      return {
        positions: tops.length,
        kl: sumOf(kls),
        klEven: sumOf(kls.filter((_, position) => position % 2 === 0)),
        equalTops: tops.filter((top, row) => top === found.tops[row]).length,
        loss: sumOf(found.losses),
      };
    },
  };
}

/**
 * Returns a function for the logits of the scored positions, `[P, V]`. The tokens before them are the same in many
 * prompts (a template's system prompt), so their keys and values are computed once for each mask and kept. That does
 * not change the results' bits.
 */
function createForward(runner: Runner): (sample: Sample, mask: Mask) => Promise<Float32Array> {
  const cache: SequenceCache = runner.newCache();
  const beginnings = new LRUCache<string, KvValues>({
    maxSize: BEGINNINGS_BYTES_MAX,
    sizeCalculation: ({ byteLength }) => byteLength,
  });
  return async (sample, mask) => {
    const positions = scoredPositions(sample);
    // A single row is summed in another order than several rows.
    const from = positions > 1 ? sample.scoreFrom : 0;
    const key = `${maskBits(mask)} ${mask.surrogates ?? ''} ${sample.tokenIds.subarray(0, from).join()}`;
    const known = from === 0 ? undefined : beginnings.get(key);
    cache.length = 0;
    if (known !== undefined) cache.appendPage(known, from);
    const logits = await runner.run({
      cache,
      tokenIds: sample.tokenIds.subarray(cache.length, -1),
      logitRows: Array.from({ length: positions }, (_, i) => sample.scoreFrom - cache.length + i),
      plan: { mask, kv: 'preserve' },
    });
    if (from > 0 && known === undefined) beginnings.set(key, cache.copyPage(0, from));
    return logits;
  };
}

const nextIds = ({ tokenIds, scoreFrom }: Sample): Int32Array => tokenIds.subarray(scoreFrom + 1);

export const addScores = (parts: readonly SampleScores[]): SampleScores =>
  scoresBy((name) => parts.reduce((total, part) => total + part[name], 0));

export type Figures = {
  /** Mean over the positions, nats. */
  readonly kl: number;
  /** Share of positions whose most likely token is that of the dense model. */
  readonly agreement: number;
  /** Exp of the mean loss. */
  readonly perplexity: number;
};

export const figuresOf = ({ positions, kl, equalTops, loss }: SampleScores): Figures => ({
  kl: kl / positions,
  agreement: equalTops / positions,
  perplexity: Math.exp(loss / positions),
});

/** Figures of masks on held-out prompts, as a mask set holds them. */
export type HeldOutScores = Figures & { readonly positions: number; readonly densePerplexity: number };

/** @param dense the same samples under the dense model. */
export function heldOutScores(parts: readonly SampleScores[], dense: readonly SampleScores[]): HeldOutScores {
  const total = addScores(parts);
  const densePerplexity = figuresOf(addScores(dense)).perplexity;
  return { positions: total.positions, ...figuresOf(total), densePerplexity };
}

/* Distributions, in graphs of their own. */

type PositionScores = {
  /** −log q of the row's own next token, nats, `[R]`. */
  readonly losses: Float32Array;
  /** The likeliest token, the first of equals, `[R]`. */
  readonly tops: Int32Array;
};

/** `logits`: `[R, V]`; `nextIds`: `[R]`. Both functions throw RangeError when logits are not finite. */
export type ScoreSession = {
  losses(logits: Float32Array, nextIds: ArrayLike<number>): Promise<PositionScores>;
  /** The figures, and log softmax, `[R, V]`. */
  logs(
    logits: Float32Array,
    nextIds: ArrayLike<number>,
  ): Promise<PositionScores & { readonly logs: Float32Array }>;
  /** The figures, and KL(p ‖ q) of every row, `[R]`, where `logs` is log p, `[R, V]`. */
  against(
    logits: Float32Array,
    nextIds: ArrayLike<number>,
    logs: Float32Array,
  ): Promise<PositionScores & { readonly kls: Float32Array }>;
  close(): Promise<void>;
};

export async function openScoreSession(threads: number): Promise<ScoreSession> {
  const open = (compare: boolean) => createSession(encodeModel(scoreGraph(compare)), { threads });
  const [plain, compare] = await Promise.all([open(false), open(true)]);
  return {
    async losses(logits, nextIds) {
      return positionScores(await plain.run(feedsOf(logits, nextIds), ['losses', 'tops']));
    },
    async logs(logits, nextIds) {
      const outputs = await plain.run(feedsOf(logits, nextIds), ['losses', 'tops', 'logs']);
      return { ...positionScores(outputs), logs: floats(outputs.logs!) };
    },
    async against(logits, nextIds, logs) {
      const R = nextIds.length;
      const feeds = { ...feedsOf(logits, nextIds), dense_logs: tensor('f32', logs, [R, logs.length / R]) };
      const outputs = await compare.run(feeds, ['losses', 'tops', 'kls']);
      return { ...positionScores(outputs), kls: floats(outputs.kls!) };
    },
    async close() {
      await plain.release();
      await compare.release();
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
  const losses = floats(outputs.losses!);
  if (!losses.every(Number.isFinite))
    throw new RangeError('the model gave logits that are not finite numbers');
  return { losses, tops: Int32Array.from(outputs.tops!.data as BigInt64Array, Number) };
}

function scoreGraph(compare: boolean): Graph {
  const g = new GraphBuilder('scores');
  const logits = g.input('logits', 'f32', ['R', 'V']);
  const nextIds = g.input('next_ids', 'i64', ['R', 1]);
  const flat = (value: Value, name: string) => {
    g.node('Reshape', [value, g.ints(-1)], [name]);
    g.output({ name }, 'f32', ['R']);
  };
  g.node('LogSoftmax', [logits], ['logs'], { axis: -1 });
  const logs = { name: 'logs' };
  flat(g.op('Neg', [g.op('GatherElements', [logs, nextIds], { axis: 1 })]), 'losses');
  g.node('ArgMax', [logits], ['tops'], { axis: -1, keepdims: 0 });
  g.output({ name: 'tops' }, 'i64', ['R']);
  if (compare) flat(divergence(g, g.input('dense_logs', 'f32', ['R', 'V']), logs), 'kls');
  else g.output(logs, 'f32', ['R', 'V']);
  return g.graph;
}

/**
 * Σ_v p · (log p − log q) of every row, as one batch of dot products: `[R, 1, 1]`. The difference of Σ p·log p and
 * Σ p·logit would cost a pass less, but the rounding of such large sums comes to 5e-4 nats on 49,152 tokens.
 */
const divergence = (g: GraphBuilder, dense: Value, logs: Value): Value =>
  g.op('MatMul', [
    g.op('Unsqueeze', [g.op('Exp', [dense]), g.ints(1)]),
    g.op('Unsqueeze', [g.op('Sub', [dense, logs]), g.ints(2)]),
  ]);
