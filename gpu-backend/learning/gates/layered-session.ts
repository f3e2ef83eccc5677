/**
 * The training step of a model that does not fit into memory as a whole: layer by layer, to the same bits. Each layer
 * is a session that is opened for its turn and then closed, so that memory holds one layer's packed weights, the
 * residual stream before every layer, and the head. Values that gradients need inside a layer are recomputed from the
 * stream before it (gradient checkpointing, Chen et al., 2016; each layer is a segment). Layers that memory has room
 * for stay open.
 *
 * Opening a layer packs its weights, which takes about as long as computing a batch, so this is only for models that do
 * not fit otherwise.
 */
import type { StoredLlama } from '../../model/architectures/llama.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { readStoredLlama } from '../../model/stored-llama.ts';
import type { SurrogateTable } from '../../model/surrogates.ts';
import type { Graph } from '../../onnx/graph.ts';
import {
  createSessionIn,
  type Feeds,
  floats,
  type Outputs,
  type RuntimeTensor,
  type Session,
  tensor,
} from '../../onnx/session.ts';
import { type GateBatch, stepFeeds, surrogateFeeds, type TextBatch, textFeeds } from './batches.ts';
import { embeddingGraph, headGraph, layerGraph } from './gate-graph.ts';
import { type GateSession, type GateStep, gateStep, type LossSession } from './gate-session.ts';
import type { Rounding } from './rounding.ts';
import { TAUGHT, type Teacher, taughtBatch, teacherHeadGraph } from './teacher.ts';
import { type TrainingLinears, trainingLinears } from './training-weights.ts';

/** Everything that learning computes with a model (steps, losses, teaching), on one set of layers. */
type LayeredSession = Pick<GateSession, 'step'> &
  Pick<LossSession, 'loss'> &
  Pick<Teacher, 'teach'> & { close(): Promise<void> };

type LayeredOptions = {
  readonly threads: number;
  /** Of the run that the session computes for. */
  readonly rounding: Rounding;
  /** As `openGateSession` takes them. */
  readonly surrogates?: SurrogateTable | undefined;
  readonly tail?: boolean;
  /** How many layers stay open after their first use, counted from the first layer; 0 unless given. */
  readonly layersKept?: number;
};

/** @throws MaskrouteError `corrupt_model`. */
export async function openLayeredSession(
  folder: string,
  config: ModelConfig,
  options: LayeredOptions,
): Promise<LayeredSession> {
  const stored = await readStoredLlama(folder, config);
  const linears = await trainingLinears(folder, config, stored, options.rounding);
  const { surrogates, threads } = options;
  const { run, close } = openPieces(folder, threads);
  const model: Layered = { config, surrogates, run, pieces: piecesOf(config, stored, linears, options) };
  const { head, teacherHead } = model.pieces;
  return {
    async loss(batch: GateBatch, gates) {
      const feeds = stepFeeds(config, batch, gates, undefined);
      const last = (await streams(model, feeds, gates)).at(-1)!;
      return floats((await run(head('none'), headFeeds(feeds, last), ['loss'])).loss!)[0]!;
    },
    step: (batch: GateBatch, gates) => stepBack(model, batch, gates),
    async teach(text: TextBatch) {
      const feeds = textFeeds(text);
      // A gate at 1 multiplies by it, which changes no bit.
      const last = (await streams(model, feeds, new Float32Array(2 * config.layerCount).fill(1))).at(-1)!;
      return taughtBatch(text, await run(teacherHead, headFeeds(feeds, last), TAUGHT));
    },
    close,
  };
}

type Layered = {
  readonly config: ModelConfig;
  readonly surrogates: SurrogateTable | undefined;
  readonly pieces: ReturnType<typeof piecesOf>;
  readonly run: ReturnType<typeof openPieces>['run'];
};

/** The pieces of the model, each with the graph of its part of the step. */
function piecesOf(
  config: ModelConfig,
  stored: StoredLlama,
  linears: TrainingLinears,
  { surrogates, tail = false, layersKept = 0 }: LayeredOptions,
) {
  const surrogateRank = surrogates?.rank ?? 0;
  const embedding: Piece = { keptAs: 'embedding', build: () => embeddingGraph(config, stored) };
  const layer = (index: number, by: 'gates' | 'none'): Piece => ({
    keptAs: by === 'none' && index < layersKept ? `layer ${index}` : undefined,
    build: () => layerGraph(config, stored, linears, index, { by, surrogateRank }),
  });
  const head = (by: 'gates' | 'none'): Piece => ({
    keptAs: undefined,
    build: () => headGraph(config, stored, linears, { by, tail }),
  });
  const teacherHead: Piece = {
    keptAs: undefined,
    build: () => teacherHeadGraph(config, stored, linears),
  };
  return { embedding, layer, head, teacherHead };
}

/** The stream before every layer, and after the last. */
async function streams(model: Layered, text: Feeds, gates: ArrayLike<number>): Promise<RuntimeTensor[]> {
  const { config, pieces, run } = model;
  const first = await run(pieces.embedding, { token_ids: text.token_ids! }, ['after']);
  const all = [first.after!];
  for (let index = 0; index < config.layerCount; index++) {
    const feeds = layerFeeds(model, index, text, gates, all[index]!);
    all.push((await run(pieces.layer(index, 'none'), feeds, ['after'])).after!);
  }
  return all;
}

/** Forward through all layers, and back. */
async function stepBack(model: Layered, batch: GateBatch, gates: ArrayLike<number>): Promise<GateStep> {
  const { config, pieces, run } = model;
  const feeds = stepFeeds(config, batch, gates, undefined);
  const all = await streams(model, feeds, gates);
  const end = await run(pieces.head('gates'), headFeeds(feeds, all.pop()!), ['loss', 'before_gradient']);
  const found = new Float32Array(gates.length);
  let gradient = end.before_gradient!;
  for (let index = config.layerCount - 1; index >= 0; index--) {
    const before = all.pop()!;
    const back = await run(
      pieces.layer(index, 'gates'),
      { ...layerFeeds(model, index, feeds, gates, before), after_gradient: gradient },
      ['before_gradient', 'gate_gradients'],
    );
    found.set(floats(back.gate_gradients!), 2 * index);
    gradient = back.before_gradient!;
  }
  return gateStep(floats(end.loss!)[0]!, found, gates);
}

const layerFeeds = (
  { surrogates }: Layered,
  index: number,
  text: Feeds,
  gates: ArrayLike<number>,
  before: RuntimeTensor,
): Feeds => ({
  token_ids: text.token_ids!,
  before,
  gates: tensor('f32', Float32Array.of(gates[2 * index]!, gates[2 * index + 1]!), [2]),
  ...(surrogates && surrogateFeeds(surrogates, 2 * index, 2)),
});

const headFeeds = (
  { scored_rows, target_ids, target_probabilities }: Feeds,
  before: RuntimeTensor,
): Feeds => ({
  before,
  scored_rows: scored_rows!,
  ...(target_ids && { target_ids, target_probabilities: target_probabilities! }),
});

type Piece = {
  /** Its session stays open, under this name. */
  readonly keptAs: string | undefined;
  build(): Graph;
};

function openPieces(folder: string, threads: number) {
  const open = new Map<string, Session>();
  // Without the arena a closed piece returns its memory to the system.
  const options = { threads, spinning: false, arena: false };
  return {
    async run({ keptAs, build }: Piece, feeds: Feeds, outputs: readonly string[]): Promise<Outputs> {
      const kept = keptAs === undefined ? undefined : open.get(keptAs);
      const session = kept ?? (await createSessionIn(folder, build(), options));
      if (keptAs !== undefined) open.set(keptAs, session);
      try {
        return await session.run(feeds, outputs);
      } finally {
        if (keptAs === undefined) await session.release();
      }
    },
    async close(): Promise<void> {
      for (const session of open.values()) await session.release();
      open.clear();
    },
  };
}
