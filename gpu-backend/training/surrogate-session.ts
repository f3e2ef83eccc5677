/** A step of distillation on one installed model: loss, and its gradients by the tables of surrogates. */
import type { StoredLlama } from '../model/architectures/llama.ts';
import type { SurrogateTable } from '../model/surrogates.ts';
import type { LlamaConfig, WeightKind } from '../model/types.ts';
import { floats } from '../onnx/session.ts';
import type { GateBatch } from './batch.ts';
import { stepFeeds } from './batch.ts';
import { fittingStepGraph } from './gate-graph.ts';
import type { SurrogatePart } from './surrogate-branch.ts';
import { SURROGATE_PARTS } from './surrogate-branch.ts';
import { openTrainingGraph } from './training-graph-session.ts';
import type { TrainingLinears } from './training-weights.ts';

/** By part, in the layout of `SurrogateTable`; 0 for the blocks that run. */
export type SurrogateGradients = Readonly<Record<SurrogatePart, Float32Array>>;

export type SurrogateSession = {
  /** `runs`: `[2L]`, 1 or 0. @throws RangeError on sizes that do not fit each other. */
  step(
    batch: GateBatch,
    runs: ArrayLike<number>,
    table: SurrogateTable,
  ): Promise<{ loss: number; gradients: SurrogateGradients }>;
  close(): Promise<void>;
};

export async function openSurrogateSession(
  folder: string,
  config: LlamaConfig,
  kind: WeightKind,
  { rank, threads }: { readonly rank: number; readonly threads: number },
): Promise<SurrogateSession> {
  const build = (stored: StoredLlama, linears: TrainingLinears) =>
    fittingStepGraph(config, stored, linears, { by: 'surrogates', surrogateRank: rank, tail: true });
  const name = `surrogates-rank-${rank}`;
  const session = await openTrainingGraph(folder, config, kind, name, build, { threads });
  return {
    async step(batch, runs, table) {
      const outputs = await session.run(stepFeeds(config, batch, runs, table), [
        'loss',
        ...SURROGATE_PARTS.map((part) => `surrogate_${part}_gradients`),
      ]);
      const gradients = Object.fromEntries(
        SURROGATE_PARTS.map((part) => [part, floats(outputs[`surrogate_${part}_gradients`]!)]),
      ) as Record<SurrogatePart, Float32Array>;
      return { loss: floats(outputs.loss!)[0]!, gradients };
    },
    close: () => session.release(),
  };
}
