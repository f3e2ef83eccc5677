/** What the builder emits is what ONNX Runtime runs. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { expect, test } from 'vitest';
import { encodeModel, ModelProto } from '../../../gpu-backend/onnx/encode.ts';
import { GraphBuilder, giveNothingBack } from '../../../gpu-backend/onnx/graph.ts';
import { createSession, createSessionIn, floats, tensor } from '../../../gpu-backend/onnx/session.ts';

test('constants, attributes, optional inputs and branches survive the way into the runtime', async () => {
  const g = new GraphBuilder('g');
  const x = g.input('x', 'f32', ['N', 4]);
  const condition = g.input('condition', 'bool', []);
  const branch = (factor: number) =>
    g.subgraph('branch', (b) =>
      b.output(b.op('Mul', [x, b.constant('f32', [1], [factor])]), 'f32', ['N', 4]),
    );
  const chosen = g.op('If', [condition], {
    then_branch: { graph: branch(2) },
    else_branch: { graph: branch(-1) },
  });
  // Clip's minimum is left out; Softmax takes an integer attribute, LeakyRelu a float one.
  const clipped = g.op('Clip', [chosen, undefined, g.constant('f32', [], [5])]);
  const leaky = g.op('LeakyRelu', [clipped], { alpha: { float: 0.5 } });
  const [left, right] = g.ops('Split', [leaky, g.constant('i64', [2], [1, 3])], 2, { axis: 1 });
  g.output(g.op('Concat', [right!, left!], { axis: 1 }), 'f32', ['N', 4]);
  const session = await createSession(encodeModel(g.graph), { threads: 1 });
  const run = async (on: number) => {
    const feeds = {
      x: tensor('f32', Float32Array.of(1, 2, 3, 4), [1, 4]),
      condition: tensor('bool', Uint8Array.of(on), []),
    };
    return [...floats((await session.run(feeds, session.outputNames))[session.outputNames[0]!]!)];
  };
  expect(await run(1)).toEqual([4, 5, 5, 2]);
  expect(await run(0)).toEqual([-1, -1.5, -2, -0.5]);
  await session.release();
});

test('a graph has equal constants and nodes once, and other ones apart', () => {
  const g = new GraphBuilder('g');
  const x = g.input('x', 'f32', [2]);
  const clip = (b: GraphBuilder, least: number) => b.op('Clip', [x, b.constant('f32', [], [least])]);
  expect(clip(g, 1)).toEqual(clip(g, 1));
  expect(clip(g, -Infinity)).not.toEqual(clip(g, Infinity));
  expect(g.constant('f32', [1], [1])).not.toEqual(g.constant('f32', [], [1]));
  const parts = (count: number) => g.ops('Split', [x], count, { axis: 0, num_outputs: count });
  expect(parts(2)).toEqual(parts(2));
  expect(parts(1)).not.toEqual(parts(2));
  expect(g.graph.nodes.map(({ op }) => op)).toEqual(['Clip', 'Clip', 'Clip', 'Split', 'Split']);
  // Gradients declare the constants of a branch again, so each branch has its own.
  const branch = g.subgraph('branch', (b) => b.output(clip(b, 1), 'f32', [2]));
  expect(branch.nodes).toHaveLength(1);
  expect(branch.initializers).toHaveLength(1);
});

test('the runtime is told shapes that it cannot infer', async () => {
  const g = new GraphBuilder('g');
  const rows = g.op('NonZero', [g.input('x', 'f32', ['N'])]);
  g.describe(rows, 'i64', [1, 'rows']);
  g.output(g.op('Identity', [rows]), 'i64', [1, 'rows']);
  const bytes = encodeModel(g.graph);
  const { graph } = ModelProto.toObject(ModelProto.decode(bytes), { longs: Number }) as {
    graph: { value_info: unknown };
  };
  const shape = { dim: [{ dim_value: 1 }, { dim_param: 'rows' }] };
  expect(graph.value_info).toMatchObject([{ name: rows.name, type: { tensor_type: { shape } } }]);
  await (await createSession(bytes, { threads: 1 })).release();
});

test('an attribute that is no integer is refused unless it says that it is a float', () => {
  const g = new GraphBuilder('g');
  const x = g.input('x', 'f32', [1]);
  g.output(g.op('Softmax', [x], { axis: 0.5 }), 'f32', [1]);
  expect(() => encodeModel(g.graph)).toThrow('not an integer');
});

test('a graph that gives nothing back writes into our memory, and still says what fails', async () => {
  const g = new GraphBuilder('g');
  const x = g.input('x', 'f32', ['N']);
  giveNothingBack(g, x, 'f32');
  const size = g.input('size', 'i64', [1]);
  g.node('Reshape', [x, size], ['y']);
  g.output({ name: 'y' }, 'f32', ['N']);
  const session = await createSession(encodeModel(g.graph), { threads: 1 });
  const feeds = (size: number) => ({
    x: tensor('f32', Float32Array.of(1, 2, 3), [3]),
    size: tensor('i64', BigInt64Array.of(BigInt(size)), [1]),
  });
  const memory = new Float32Array(3);
  await session.runInPlace(feeds(3), { y: tensor('f32', memory, [3]) });
  expect([...memory]).toEqual([1, 2, 3]);
  await expect(session.runInPlace(feeds(2), { y: tensor('f32', memory, [3]) })).rejects.toThrow('Reshape');
  // Others may still ask for outputs by their names.
  const { y } = await session.run(feeds(3), ['y']);
  expect([...floats(y!)]).toEqual([1, 2, 3]);
  await session.release();
});

/** A process, and what a thread of it opens: a thread's variables are its own, and the runtime reads the process's. */
test('a graph that is opened in a folder leaves no file there, and clears what a killed process left', async () => {
  const folder = mkdtempSync(path.join(tmpdir(), 'graph-'));
  for (const name of ['.g.onnx.old', '.g.onnx.new', '.other.onnx.old']) {
    writeFileSync(path.join(folder, name), '');
    const age_s = name.endsWith('old') ? 7200 : 0;
    utimesSync(path.join(folder, name), Date.now() / 1000, Date.now() / 1000 - age_s);
  }
  const g = new GraphBuilder('g');
  g.output(g.op('Neg', [g.input('x', 'f32', [1])]), 'f32', [1]);
  await (await createSessionIn(folder, g.graph, { threads: 1 })).release();
  expect(readdirSync(folder).sort()).toEqual(['.g.onnx.new', '.other.onnx.old']);
  rmSync(folder, { recursive: true });
});

test.each(['main.ts', 'learning/units/unit-thread.ts'])(
  'no process in which %s starts threads tells anybody of its sessions, or leaves files of them',
  (starter) => {
    const folder = mkdtempSync(path.join(tmpdir(), 'runtime-'));
    const module = (name: string) => JSON.stringify(pathToFileURL(path.resolve('gpu-backend', name)).href);
    const open = `const { GraphBuilder } = await import(${module('onnx/graph.ts')});
      const { encodeModel } = await import(${module('onnx/encode.ts')});
      const { createSession } = await import(${module('onnx/session.ts')});
      const g = new GraphBuilder('g');
      g.output(g.op('Neg', [g.input('x', 'f32', [1])]), 'f32', [1]);
      await (await createSession(encodeModel(g.graph), { threads: 1 })).release();`;
    const main = `await import(${module(starter)});
      const { Worker } = await import('node:worker_threads');
      new Worker(new URL('data:text/javascript,' + encodeURIComponent(process.argv[1])));`;
    // Where it thinks that it is tested, the runtime is quiet by itself; this process has said no already.
    const { CI: _, ORT_DISABLE_TELEMETRY: __, ...own } = process.env;
    const env = { ...own, HOME: folder, XDG_CACHE_HOME: folder, TMPDIR: folder };
    const { status, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', main, open], {
      env,
      encoding: 'utf8',
    });
    expect([status, stderr]).toEqual([0, '']);
    expect(readdirSync(folder)).toEqual([]);
    rmSync(folder, { recursive: true });
  },
);
