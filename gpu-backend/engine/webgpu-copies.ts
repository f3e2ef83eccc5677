/**
 * Copies within a GPU's memory, done by small graphs, since only graphs can access it. Growing copies buffer by buffer, so
 * that at most one buffer exists twice; a sequence is copied from or to all buffers in one run.
 */
import { encodeModel } from '../onnx/encode.ts';
import { GraphBuilder, type Value } from '../onnx/graph.ts';
import type { RuntimeTensor, Session } from '../onnx/session.ts';
import { createSession, integers, tensor } from '../onnx/session.ts';
import type { CacheShape } from './kv-cache.ts';

export type DeviceCacheShape = CacheShape & {
  readonly kvHeadCount: number;
  readonly headSize: number;
};

export function dispose(tensors: readonly RuntimeTensor[]): void {
  for (const each of tensors) each.dispose();
}

/** Buffers are `[P, G, T, D]`. */
export type Copies = {
  /** A copy with so many more places and tokens, filled with zeros. */
  pad(buffer: RuntimeTensor, places: number, tokens: number): Promise<RuntimeTensor>;
  /** A copy of one place, `[1, G, T, D]`. */
  take(buffer: RuntimeTensor, place: number): Promise<RuntimeTensor>;
  /** Writes `row` `[1, G, T, D]` to a place. */
  put(buffer: RuntimeTensor, row: RuntimeTensor, place: number): Promise<void>;
  /** Copies of the first tokens of a place, `[1, G, tokens, D]` each. */
  cut(buffers: readonly RuntimeTensor[], place: number, tokens: number): Promise<RuntimeTensor[]>;
  /** Writes the first tokens of `rows` to a place. */
  fill(
    buffers: readonly RuntimeTensor[],
    place: number,
    rows: readonly RuntimeTensor[],
    tokens: number,
  ): Promise<void>;
  /** Copies one buffer after the other; if one fails, disposes of the copies made so far. */
  each(
    buffers: readonly RuntimeTensor[],
    copy: (buffer: RuntimeTensor) => Promise<RuntimeTensor>,
  ): Promise<RuntimeTensor[]>;
  close(): Promise<void>;
};

export async function openCopies(shape: DeviceCacheShape): Promise<Copies> {
  const [pad, take, put] = [await openPad(shape), await openTake(shape), await openPut(shape)];
  const [cut, fill] = [await openCut(shape), await openFill(shape)];
  const copy = async (by: Session, feeds: Parameters<Session['run']>[0]) =>
    (await by.run(feeds, ['copy'])).copy!;
  const at = (place: number) => tensor('i32', Int32Array.of(place), [1, 1, 1, 1]);
  return {
    pad: (buffer, places, tokens) =>
      copy(pad, { buffer, pads: integers([0, 0, 0, 0, places, 0, tokens, 0]) }),
    take: (buffer, place) => copy(take, { buffer, place: integers([place]) }),
    async put(buffer, row, place) {
      await put.run({ buffer, row, place: at(place) }, { copy: buffer });
    },
    async cut(buffers, place, tokens) {
      const feeds = {
        ...named('buffer', buffers),
        from: integers([place, 0]),
        to: integers([place + 1, tokens]),
      };
      const outputs = await cut.run(feeds, cut.outputNames);
      return buffers.map((_, i) => outputs[`rows_${i}`]!);
    },
    async fill(buffers, place, rows, tokens) {
      const feeds = {
        ...named('buffer', buffers),
        ...named('rows', rows),
        place: at(place),
        tokens: integers([tokens]),
      };
      await fill.run(feeds, named('filled', buffers));
    },
    async each(buffers, make) {
      const made: RuntimeTensor[] = [];
      try {
        for (const buffer of buffers) made.push(await make(buffer));
        return made;
      } catch (error) {
        dispose(made);
        throw error;
      }
    },
    async close() {
      for (const session of [pad, take, put, cut, fill]) await session.release();
    },
  };
}

const named = (name: string, tensors: readonly RuntimeTensor[]): Record<string, RuntimeTensor> =>
  Object.fromEntries(tensors.map((each, i) => [`${name}_${i}`, each]));

/** A graph of one buffer, `[P, G, T, D]`, with the output `copy`. `stay`: the outputs that stay on the device. */
function openCopy(
  { kvHeadCount: G, headSize: D, kvType }: DeviceCacheShape,
  stay: readonly string[],
  build: (g: GraphBuilder, buffer: Value) => readonly (string | number)[],
): Promise<Session> {
  const g = new GraphBuilder('copy');
  const sizes = build(g, g.input('buffer', kvType, ['P', G, 'T', D]));
  g.output({ name: 'copy' }, kvType, sizes);
  return createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu', stay });
}

/** `copy` = `buffer` with zeros behind, as `pads` says. */
const openPad = (shape: DeviceCacheShape): Promise<Session> =>
  openCopy(shape, ['copy'], (g, buffer) => {
    g.node('Pad', [buffer, g.input('pads', 'i64', [8])], ['copy']);
    return ['P2', shape.kvHeadCount, 'T2', shape.headSize];
  });

/** `copy` = `buffer[place]`. */
const openTake = (shape: DeviceCacheShape): Promise<Session> =>
  openCopy(shape, ['copy'], (g, buffer) => {
    g.node('Gather', [buffer, g.input('place', 'i64', [1])], ['copy'], { axis: 0 });
    return [1, shape.kvHeadCount, 'T', shape.headSize];
  });

/** `copy` = `buffer` with `row` at `place`. */
const openPut = (shape: DeviceCacheShape): Promise<Session> =>
  openCopy(shape, [], (g, buffer) => {
    const { kvHeadCount: G, headSize: D, kvType } = shape;
    const row = g.input('row', kvType, [1, G, 'T', D]);
    const places = g.op('Expand', [g.input('place', 'i32', [1, 1, 1, 1]), g.op('Shape', [row])]);
    g.node('ScatterElements', [buffer, places, row], ['copy'], { axis: 0 });
    return ['P', G, 'T', D];
  });

/** `rows_i` = `buffer_i[from[0]:to[0], :, from[1]:to[1], :]`. */
function openCut({ layerCount, kvHeadCount: G, headSize: D, kvType }: DeviceCacheShape): Promise<Session> {
  const g = new GraphBuilder('cut');
  const bounds = [g.input('from', 'i64', [2]), g.input('to', 'i64', [2]), g.constant('i64', [2], [0, 2])];
  const stay = Array.from({ length: 2 * layerCount }, (_, i) => `rows_${i}`);
  stay.forEach((name, i) => {
    g.node('Slice', [g.input(`buffer_${i}`, kvType, ['P', G, 'T', D]), ...bounds], [name]);
    g.output({ name }, kvType, [1, G, 'N', D]);
  });
  return createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu', stay });
}

/** `filled_i` = `buffer_i` with the first `tokens` of `rows_i` at `place`. */
function openFill({ layerCount, kvHeadCount: G, headSize: D, kvType }: DeviceCacheShape): Promise<Session> {
  const g = new GraphBuilder('fill');
  const place = g.input('place', 'i32', [1, 1, 1, 1]);
  const tokens = g.input('tokens', 'i64', [1]);
  const size = g.op('Concat', [g.constant('i64', [2], [1, G]), tokens, g.constant('i64', [1], [D])], {
    axis: 0,
  });
  const places = g.op('Expand', [place, size]);
  const bounds = [g.constant('i64', [1], [0]), tokens, g.constant('i64', [1], [2])];
  for (let i = 0; i < 2 * layerCount; i++) {
    const buffer = g.input(`buffer_${i}`, kvType, ['P', G, 'T', D]);
    const rows = g.op('Slice', [g.input(`rows_${i}`, kvType, [1, G, 'N', D]), ...bounds]);
    g.node('ScatterElements', [buffer, places, rows], [`filled_${i}`], { axis: 0 });
    g.output({ name: `filled_${i}` }, kvType, ['P', G, 'T', D]);
  }
  return createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu' });
}
