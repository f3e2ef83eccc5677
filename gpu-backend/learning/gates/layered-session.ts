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
import { join } from 'node:path';
import { writeWhole } from '../../files.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { readStoredLlama } from '../../model/stored-llama.ts';
import type { SurrogateTable } from '../../model/surrogates.ts';
import { encodeModel } from '../../onnx/encode.ts';
import type { Graph } from '../../onnx/graph.ts';
import {
  createSession,
  type Feeds,
  floats,
  type Outputs,
  type RuntimeTensor,
  type Session,
  tensor,
} from '../../onnx/session.ts';
import { SURROGATE_PARTS, surrogateShapes } from '../surrogates/surrogate-graph.ts';
import { type GateBatch, stepFeeds, type TextBatch, textFeeds } from './batches.ts';
import { embeddingGraph, headGraph, layerGraph } from './gate-graph.ts';
import { type GateSession, gateStep, type LossSession } from './gate-session.ts';
import { TAUGHT, type Teacher, taughtBatch, teacherHeadGraph } from './teacher.ts';
import { trainingLinears } from './training-weights.ts';

/** Everything that learning computes with a model (steps, losses, teaching), on one set of layers. */
type LayeredSession = Pick<GateSession, 'step'> &
  Pick<LossSession, 'loss'> &
  Pick<Teacher, 'teach'> & { close(): Promise<void> };

type LayeredOptions = {
  readonly threads: number;
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
  { threads, surrogates, tail = false, layersKept = 0 }: LayeredOptions,
): Promise<LayeredSession> {
  const stored = await readStoredLlama(folder, config);
  const linears = await trainingLinears(folder, config, stored);
  const surrogateRank = surrogates?.rank ?? 0;
  const pieces = openPieces(folder, threads);
  const embedding: Piece = { name: 'embedding', isKept: true, build: () => embeddingGraph(config, stored) };
  const layer = (index: number, by: 'gates' | 'none'): Piece => ({
    name: `layer-${index}-${by}-rank-${surrogateRank}`,
    isKept: by === 'none' && index < layersKept,
    build: () => layerGraph(config, stored, linears, index, { by, surrogateRank }),
  });
  const head = (by: 'gates' | 'none'): Piece => ({
    name: `head-${by}${tail ? '-tail' : ''}`,
    isKept: false,
    build: () => headGraph(config, stored, linears, { by, tail }),
  });
  const teacherHead: Piece = {
    name: 'head-teacher',
    isKept: false,
    build: () => teacherHeadGraph(config, stored, linears),
  };

  const layerFeeds = (
    index: number,
    text: Feeds,
    gates: ArrayLike<number>,
    before: RuntimeTensor,
  ): Feeds => ({
    token_ids: text.token_ids!,
    before,
    gates: tensor('f32', Float32Array.of(gates[2 * index]!, gates[2 * index + 1]!), [2]),
    ...(surrogates && surrogateRows(config, surrogates, index)),
  });
  /** The stream before every layer, and after the last. */
  const streams = async (text: Feeds, gates: ArrayLike<number>): Promise<RuntimeTensor[]> => {
    const first = await pieces.run(embedding, { token_ids: text.token_ids! }, ['after']);
    const all = [first.after!];
    for (let index = 0; index < config.layerCount; index++) {
      const feeds = layerFeeds(index, text, gates, all[index]!);
      all.push((await pieces.run(layer(index, 'none'), feeds, ['after'])).after!);
    }
    return all;
  };
  const headFeeds = (
    { scored_rows, target_ids, target_probabilities }: Feeds,
    before: RuntimeTensor,
  ): Feeds => ({
    ...{ before, scored_rows: scored_rows! },
    ...(target_ids && { target_ids, target_probabilities: target_probabilities! }),
  });

  return {
    async loss(batch: GateBatch, gates) {
      const feeds = stepFeeds(config, batch, gates, undefined);
      const last = (await streams(feeds, gates)).at(-1)!;
      return floats((await pieces.run(head('none'), headFeeds(feeds, last), ['loss'])).loss!)[0]!;
    },
    async step(batch: GateBatch, gates) {
      const feeds = stepFeeds(config, batch, gates, undefined);
      const all = await streams(feeds, gates);
      const end = await pieces.run(head('gates'), headFeeds(feeds, all.pop()!), ['loss', 'before_gradient']);
      const found = new Float32Array(gates.length);
      let gradient = end.before_gradient!;
      for (let index = config.layerCount - 1; index >= 0; index--) {
        const before = all.pop()!;
        const back = await pieces.run(
          layer(index, 'gates'),
          { ...layerFeeds(index, feeds, gates, before), after_gradient: gradient },
          ['before_gradient', 'gate_gradients'],
        );
        found.set(floats(back.gate_gradients!), 2 * index);
        gradient = back.before_gradient!;
      }
      return gateStep(floats(end.loss!)[0]!, found, gates);
    },
    async teach(text: TextBatch) {
      const feeds = textFeeds(text);
      // A gate at 1 multiplies by it, which changes no bit.
      const last = (await streams(feeds, new Float32Array(2 * config.layerCount).fill(1))).at(-1)!;
      return taughtBatch(text, await pieces.run(teacherHead, headFeeds(feeds, last), TAUGHT));
    },
    close: pieces.close,
  };
}

/** A layer's two rows (attention, FFN) of every table of surrogates. */
function surrogateRows(config: ModelConfig, table: SurrogateTable, layer: number): Feeds {
  const shapes = surrogateShapes({ ...config, layerCount: 1 }, table.rank);
  return Object.fromEntries(
    SURROGATE_PARTS.map((part) => {
      const count = shapes[part].reduce((all, size) => all * size, 1);
      const rows = table[part].subarray(layer * count, (layer + 1) * count);
      return [`surrogate_${part}`, tensor('f32', rows, shapes[part])];
    }),
  );
}

type Piece = {
  readonly name: string;
  /** Whether its session stays open. */
  readonly isKept: boolean;
  build(): Graph;
};

function openPieces(folder: string, threads: number) {
  const written = new Set<string>();
  const open = new Map<string, Session>();
  const openPiece = async ({ name, build }: Piece): Promise<Session> => {
    // External weights are found beside the graph's file.
    const path = join(folder, `training-piece-${name}.onnx`);
    if (!written.has(name)) await writeWhole(path, encodeModel(build()));
    written.add(name);
    // Without the arena a closed piece returns its memory to the system.
    return createSession(path, { threads, spinning: false, arena: false });
  };
  return {
    async run(piece: Piece, feeds: Feeds, outputs: readonly string[]): Promise<Outputs> {
      const found = open.get(piece.name);
      if (found !== undefined) return found.run(feeds, outputs);
      const session = await openPiece(piece);
      if (piece.isKept) open.set(piece.name, session);
      try {
        return await session.run(feeds, outputs);
      } finally {
        if (!piece.isKept) await session.release();
      }
    },
    async close(): Promise<void> {
      for (const session of open.values()) await session.release();
      open.clear();
    },
  };
}
