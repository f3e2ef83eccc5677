/** The teacher: the dense model's K most likely next tokens at each position of a text, the targets of all learning. */
import type { StoredLlama } from '../../model/architectures/llama.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import type { Graph } from '../../onnx/graph.ts';
import { GraphBuilder, type Value } from '../../onnx/graph.ts';
import { floats, type Outputs } from '../../onnx/session.ts';
import type { GateBatch, TextBatch } from './batches.ts';
import { textFeeds } from './batches.ts';
import { headProducts } from './gate-graph.ts';
import { openTrainingGraph, type TrainingSessionOptions } from './gate-session.ts';
import { forward, scoredRows } from './training-forward.ts';
import type { TrainingLinears } from './training-weights.ts';

/** A batch with the dense model's targets, small enough that many can be kept. */
export type TaughtBatch = GateBatch & {
  readonly targetIds: Int32Array;
  readonly targetProbabilities: Float32Array;
  /**
   * Mean entropy of the targets in nats, with all other tokens as one more target. With `tail`, loss − entropy is the
   * KL over these K + 1 targets: a little less than the KL over all tokens.
   */
  readonly entropy: number;
};

export type Teacher = {
  teach(text: TextBatch): Promise<TaughtBatch>;
  close(): Promise<void>;
};

/** K. On ordinary text these tokens have six sevenths of the probability; `tail` accounts for the rest. */
const TARGET_COUNT = 64;

export async function openTeacher(
  folder: string,
  config: ModelConfig,
  options: TrainingSessionOptions,
): Promise<Teacher> {
  const build = (stored: StoredLlama, linears: TrainingLinears) => teacherGraph(config, stored, linears);
  const session = await openTrainingGraph(folder, config, build, options);
  return {
    async teach(text) {
      return taughtBatch(text, await session.run(textFeeds(text), TAUGHT));
    },
    close: () => session.release(),
  };
}

/** The outputs of a teacher's graph. */
export const TAUGHT = ['ids', 'probabilities'];

/** `outputs`: {@link TAUGHT}. */
export function taughtBatch(text: TextBatch, outputs: Outputs): TaughtBatch {
  const targetProbabilities = floats(outputs.probabilities!);
  const targetIds = Int32Array.from(outputs.ids!.data as BigInt64Array, Number);
  const rows = text.scoredRows.length;
  const entropy = totalEntropy(targetProbabilities, targetProbabilities.length / rows) / rows;
  return { ...text, targetIds, targetProbabilities, entropy };
}

function totalEntropy(probabilities: Float32Array, count: number): number {
  const term = (p: number) => (p > 0 ? -p * Math.log(p) : 0);
  let sum = 0;
  for (let start = 0; start < probabilities.length; start += count) {
    let rest = 1;
    for (let i = start; i < start + count; i++) {
      sum += term(probabilities[i]!);
      rest -= probabilities[i]!;
    }
    sum += term(rest);
  }
  return sum;
}

function teacherGraph(config: ModelConfig, stored: StoredLlama, linears: TrainingLinears): Graph {
  const g = new GraphBuilder('teacher');
  const h = forward(g, { config, stored, isDifferentiated: false }, linears, (_, before, block) =>
    g.op('Add', [before, block(g, before)]),
  );
  likeliest(g, config, linears, scoredRows(g, config, stored, h));
  return g.graph;
}

/** The teacher's last piece of a model in pieces: input `before` `[B, S, H]`, the stream after all layers. */
export function teacherHeadGraph(config: ModelConfig, stored: StoredLlama, linears: TrainingLinears): Graph {
  const g = new GraphBuilder('teacher_head');
  const before = g.input('before', 'f32', ['B', 'S', config.hiddenSize]);
  likeliest(g, config, linears, scoredRows(g, config, stored, before));
  return g.graph;
}

/** Adds outputs `ids` and `probabilities`, `[R, K]`: the most likely tokens for each row of the final norm's output. */
function likeliest(g: GraphBuilder, config: ModelConfig, linears: TrainingLinears, final: Value): void {
  const logits = headProducts(g, linears.get('head')!).forward(final);
  const count = Math.min(TARGET_COUNT, config.vocabularySize);
  const all = g.op('Softmax', [logits], { axis: -1 });
  const [most, ids] = g.ops('TopK', [all, g.ints(count)], 2, { axis: -1 });
  g.node('Identity', [most], ['probabilities']);
  g.node('Identity', [ids], ['ids']);
  g.output({ name: 'ids' }, 'i64', ['R', count]);
  g.output({ name: 'probabilities' }, 'f32', ['R', count]);
}
