/** The training step of one installed model: loss and gate gradients for a batch, in one call. */
import { join } from 'node:path';
import type { LlamaConfig, WeightKind } from '../model/types.ts';
import { encodeModel } from '../onnx/encode.ts';
import type { Session } from '../onnx/session.ts';
import { createSession, floats, tensor } from '../onnx/session.ts';
import { writeWhole } from '../write-whole.ts';
import { gateGraph } from './gate-graph.ts';
import { readStoredLlama } from './stored-llama.ts';
import { trainingLinears } from './training-weights.ts';

/** B sequences of S tokens, R scored positions with K target tokens each. */
export type GateBatch = {
  /** `[B, S]`, row-major. */
  readonly tokenIds: ArrayLike<number>;
  readonly sequences: number;
  /** Positions b·S + s whose prediction counts, `[R]`. */
  readonly scoredRows: ArrayLike<number>;
  /** `[R, K]`. */
  readonly targetIds: ArrayLike<number>;
  /** `[R, K]`; every row sums to 1. */
  readonly targetProbabilities: ArrayLike<number>;
};

export type GateStep = {
  /** Mean over the scored positions, nats. */
  readonly loss: number;
  /** ∂loss/∂gate, `[2L]`; exactly 0 where the gate is. */
  readonly gradients: Float32Array;
};

export type GateSession = {
  readonly gateCount: number;
  /** `gates`: `[2L]`. @throws RangeError on sizes that do not fit each other. */
  step(batch: GateBatch, gates: ArrayLike<number>): Promise<GateStep>;
  close(): Promise<void>;
};

export type GateSessionOptions = { readonly threads: number; readonly profileFile?: string };

const GRAPH_FILE = 'training.onnx';

/** Opens the model in `folder`; the first time, transposed weights and the graph are written beside it. */
export async function openGateSession(
  folder: string,
  config: LlamaConfig,
  kind: WeightKind,
  options: GateSessionOptions,
): Promise<GateSession> {
  const stored = await readStoredLlama(folder, config, kind);
  const linears = await trainingLinears(folder, config, stored);
  // External weights are found beside the graph's file.
  const path = join(folder, GRAPH_FILE);
  await writeWhole(path, encodeModel(gateGraph(config, stored, linears)));
  const session = await createSession(path, options);
  return {
    gateCount: 2 * config.layerCount,
    step: (batch, gates) => step(session, config, batch, gates),
    close: async () => {
      session.endProfiling();
      await session.release();
    },
  };
}

async function step(
  session: Session,
  config: LlamaConfig,
  batch: GateBatch,
  gates: ArrayLike<number>,
): Promise<GateStep> {
  const { tokenIds, sequences: B, scoredRows, targetIds, targetProbabilities } = batch;
  const [S, R] = [tokenIds.length / B, scoredRows.length];
  const K = targetIds.length / R;
  if (!Number.isInteger(S) || !Number.isInteger(K) || targetProbabilities.length !== targetIds.length)
    throw new RangeError(
      `${tokenIds.length} tokens in ${B} sequences, ${targetIds.length} target ids and ` +
        `${targetProbabilities.length} probabilities for ${R} positions`,
    );
  if (gates.length !== 2 * config.layerCount)
    throw new RangeError(`${gates.length} gates for ${config.layerCount} layers`);
  const integers = (values: ArrayLike<number>, dims: number[]) =>
    tensor('i64', BigInt64Array.from(values, BigInt), dims);
  const outputs = await session.run(
    {
      token_ids: integers(tokenIds, [B, S]),
      gates: tensor('f32', Float32Array.from(gates), [gates.length]),
      scored_rows: integers(scoredRows, [R]),
      target_ids: integers(targetIds, [R, K]),
      target_probabilities: tensor('f32', Float32Array.from(targetProbabilities), [R, K]),
    },
    ['loss', 'gate_gradients'],
  );
  return { loss: floats(outputs.loss!)[0]!, gradients: floats(outputs.gate_gradients!) };
}

/** Every position of every sequence but the last predicts the next token. */
export function nextTokenBatch(tokenIds: ArrayLike<number>, sequences: number): GateBatch {
  const length = tokenIds.length / sequences;
  const scoredRows = Array.from(tokenIds, (_, i) => i).filter((i) => i % length !== length - 1);
  return {
    tokenIds,
    sequences,
    scoredRows,
    targetIds: scoredRows.map((row) => tokenIds[row + 1]!),
    targetProbabilities: scoredRows.map(() => 1),
  };
}
