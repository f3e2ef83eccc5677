/** The training step of one installed model: loss and gate gradients for a batch, or the loss alone, in one call. */
import type { StoredLlama } from '../../model/architectures/llama.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { readStoredLlama } from '../../model/stored-llama.ts';
import type { SurrogateTable } from '../../model/surrogates.ts';
import type { Graph } from '../../onnx/graph.ts';
import { createSessionIn, floats, type Session } from '../../onnx/session.ts';
import { type GateBatch, stepFeeds } from './batches.ts';
import { fittingStepGraph } from './gate-graph.ts';
import { fastestRounding, type Rounding } from './rounding.ts';
import { type TrainingLinears, trainingLinears } from './training-weights.ts';

export type GateStep = {
  /** Mean over the scored positions, nats. */
  readonly loss: number;
  /** ∂loss/∂gate, `[2L]`; exactly 0 where the gate is 0. */
  readonly gradients: Float32Array;
};

export type GateSession = {
  /** `gates`: `[2L]`. @throws RangeError on sizes that do not fit each other. */
  step(batch: GateBatch, gates: ArrayLike<number>): Promise<GateStep>;
  close(): Promise<void>;
};

/** The forward pass only, for ranking and searching masks; takes less than half the time of a step. */
export type LossSession = {
  /**
   * Mean over the scored positions, nats; `gates` `[2L]`, such as a mask's `runs`. With a teacher's targets the loss is
   * the KL plus their entropy. @throws RangeError on sizes that do not fit each other.
   */
  loss(batch: GateBatch, gates: ArrayLike<number>): Promise<number>;
  close(): Promise<void>;
};

export type TrainingSessionOptions = {
  readonly threads: number;
  /** Of the run that the session computes for; this machine's fastest unless given. */
  readonly rounding?: Rounding | undefined;
};

type GateSessionOptions = TrainingSessionOptions & {
  /**
   * Surrogates of skipped blocks, in the installed model's basis (`toInstalledBasis`). Without, skipped blocks add
   * nothing.
   */
  readonly surrogates?: SurrogateTable | undefined;
  /** For a teacher's targets, whose probabilities sum to less than 1: all other tokens share the rest. */
  readonly tail?: boolean;
  /** Whether training steps recompute values instead of keeping them; decided by available memory unless given. */
  readonly recompute?: boolean;
};

/** Opens the model in `folder`; the first time, transposed weights are written beside it. */
export async function openGateSession(
  folder: string,
  config: ModelConfig,
  options: GateSessionOptions,
): Promise<GateSession> {
  const session = await openStep(folder, config, 'gates', options);
  return {
    async step(batch, gates) {
      const feeds = stepFeeds(config, batch, gates, options.surrogates);
      const outputs = await session.run(feeds, ['loss', 'gate_gradients']);
      return gateStep(floats(outputs.loss!)[0]!, floats(outputs.gate_gradients!), gates);
    },
    close: () => session.release(),
  };
}

/**
 * Sets the gradient to 0 where a gate is 0: with a surrogate there is a one-sided derivative, but a gate at 0 does not
 * learn.
 */
export const gateStep = (loss: number, found: Float32Array, gates: ArrayLike<number>): GateStep => ({
  loss,
  gradients: found.map((value, i) => (gates[i] === 0 ? 0 : value)),
});

export async function openLossSession(
  folder: string,
  config: ModelConfig,
  options: GateSessionOptions,
): Promise<LossSession> {
  const session = await openStep(folder, config, 'none', options);
  return {
    async loss(batch, gates) {
      const outputs = await session.run(stepFeeds(config, batch, gates, options.surrogates), ['loss']);
      return floats(outputs.loss!)[0]!;
    },
    close: () => session.release(),
  };
}

function openStep(
  folder: string,
  config: ModelConfig,
  by: 'gates' | 'none',
  { surrogates, tail = false, recompute, ...options }: GateSessionOptions,
): Promise<Session> {
  const surrogateRank = surrogates?.rank ?? 0;
  const build = (stored: StoredLlama, linears: TrainingLinears) =>
    fittingStepGraph(config, stored, linears, { by, surrogateRank, tail, recompute });
  return openTrainingGraph(folder, config, build, options);
}

/**
 * Opens a training graph of an installed model. The first time, copies of the weights are written beside the model's.
 * @throws MaskrouteError `corrupt_model`.
 */
export async function openTrainingGraph(
  folder: string,
  config: ModelConfig,
  build: (stored: StoredLlama, linears: TrainingLinears) => Graph,
  { rounding, ...options }: TrainingSessionOptions,
): Promise<Session> {
  const stored = await readStoredLlama(folder, config);
  const linears = await trainingLinears(folder, config, stored, rounding ?? (await fastestRounding()));
  return createSessionIn(folder, build(stored, linears), { spinning: false, ...options });
}
