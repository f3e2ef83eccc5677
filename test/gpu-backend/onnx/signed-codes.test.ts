/** Graphs with unsigned codes compute what signed codes mean, on every CPU. */
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { expect, test } from 'vitest';
import { ELEMENT_TYPES, type Graph, GraphBuilder, MICROSOFT } from '../../../gpu-backend/onnx/graph.ts';
import {
  createSessionIn,
  floats,
  multipliesSignedExactly,
  tensor,
} from '../../../gpu-backend/onnx/session.ts';
import { withUnsignedCodes } from '../../../gpu-backend/onnx/signed-codes.ts';

const [ROWS, INPUTS, OUTPUTS] = [3, 64, 8];
/** The largest codes side by side, which overflow 16 bits, and all others. */
const WEIGHTS = Int8Array.from({ length: INPUTS * OUTPUTS }, (_, i) =>
  i % 3 === 0 ? 127 : ((i * 37) % 255) - 127,
);
/** Whole numbers from 0 to 255, so that the runtime's scale is 1 and codes are the numbers. */
const ROWS_OF_CODES = Float32Array.from({ length: ROWS * INPUTS }, (_, i) =>
  i % 2 === 0 ? 255 : (i * 7) % 256,
);

const EXPECTED = Float32Array.from({ length: ROWS * OUTPUTS }, (_, at) => {
  const [row, output] = [Math.floor(at / OUTPUTS), at % OUTPUTS];
  let sum = 0;
  for (let i = 0; i < INPUTS; i++) sum += ROWS_OF_CODES[row * INPUTS + i]! * WEIGHTS[i * OUTPUTS + output]!;
  return sum;
});

/** Both operators, in a branch that reads the outer graph's codes, as masks have them, and codes of its own. */
function products(): Graph {
  const g = new GraphBuilder('products');
  const x = g.input('x', 'f32', [ROWS, INPUTS]);
  const codesIn = (b: GraphBuilder, name: string) =>
    b.initializer(name, 'i8', [INPUTS, OUTPUTS], { kind: 'inline', bytes: new Uint8Array(WEIGHTS.buffer) });
  const outer = codesIn(g, 'outer');
  const runs = g.input('runs', 'bool', []);
  const branch = (name: string) =>
    g.subgraph(name, (b) => {
      const [one, scales, zero] = [
        b.constant('f32', [], [1]),
        b.constant('f32', [OUTPUTS], Array<number>(OUTPUTS).fill(1)),
        b.constant('u8', [], [0]),
      ];
      const rows = b.op('QuantizeLinear', [x, one, zero]);
      const inBranch = b.op('MatMulIntegerToFloat', [rows, outer, one, scales, zero], {}, MICROSOFT);
      const tensorWide = b.op('DynamicQuantizeMatMul', [x, codesIn(b, `${name}_own`), scales], {}, MICROSOFT);
      b.output(b.op('Concat', [inBranch, tensorWide], { axis: 0 }), 'f32', [2 * ROWS, OUTPUTS]);
    });
  const [then, other] = [branch('then'), branch('other')];
  g.node('If', [runs], ['y'], { then_branch: { graph: then }, else_branch: { graph: other } });
  g.output({ name: 'y' }, 'f32', [2 * ROWS, OUTPUTS]);
  return g.graph;
}

async function run(graph: Graph): Promise<Float32Array> {
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-signed-'));
  try {
    const session = await createSessionIn(folder, graph, { threads: 1 });
    const feeds = {
      x: tensor('f32', ROWS_OF_CODES, [ROWS, INPUTS]),
      runs: tensor('bool', Uint8Array.of(1), []),
    };
    const found = floats((await session.run(feeds, ['y'])).y!);
    await session.release();
    return found;
  } finally {
    await rm(folder, { recursive: true });
  }
}

test.each([
  ['turned', withUnsignedCodes(products())],
  ['as this CPU has them', products()],
])('products of the largest codes are exact in branches, too: %s', async (_, graph) => {
  expect(await run(graph)).toEqual(Float32Array.from([...EXPECTED, ...EXPECTED]));
});

test('where products overflow, a graph is opened with unsigned codes, whoever built it', () => {
  const module = (name: string) =>
    JSON.stringify(pathToFileURL(resolve('gpu-backend/onnx', `${name}.ts`)).href);
  // A runtime whose products overflow, and which opens no other graph but says what is in it.
  const script = `import { readFileSync } from 'node:fs';
    import { tmpdir } from 'node:os';
    import { InferenceSession } from 'onnxruntime-node';
    import { ModelProto } from ${module('encode')};
    import { GraphBuilder, MICROSOFT } from ${module('graph')};
    import { createSessionIn } from ${module('session')};
    const run = async (_, fetches) =>
      Object.fromEntries(Object.keys(fetches).map((name) => [name, { data: [32767] }]));
    InferenceSession.create = async (model) => {
      if (typeof model !== 'string') return { handler: { run }, release() {} };
      const { initializer } = ModelProto.decode(readFileSync(model)).graph;
      console.log(JSON.stringify(initializer.map(({ data_type }) => data_type)));
      return {};
    };
    const g = new GraphBuilder('codes');
    const w = g.initializer('w', 'i8', [1, 1], { kind: 'inline', bytes: Uint8Array.of(1) });
    g.op('DynamicQuantizeMatMul', [g.input('x', 'f32', [1, 1]), w, g.constant('f32', [], [1])], {}, MICROSOFT);
    await createSessionIn(tmpdir(), g.graph, { threads: 1 });`;
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
    encoding: 'utf8',
  });
  expect([JSON.parse(stdout || '""'), stderr]).toEqual([
    [ELEMENT_TYPES.u8, ELEMENT_TYPES.f32, ELEMENT_TYPES.u8],
    '',
  ]);
});

test('a graph without codes stays as it is', () => {
  const g = new GraphBuilder('plain');
  g.output(g.op('Neg', [g.input('x', 'f32', [1])]), 'f32', [1]);
  expect(withUnsignedCodes(g.graph)).toEqual(g.graph);
});

test.runIf(process.platform === 'linux' && process.arch === 'x64')(
  'codes are multiplied signed where the CPU has VNNI',
  async () => {
    const flags = readFileSync('/proc/cpuinfo', 'utf8');
    expect(await multipliesSignedExactly()).toBe(/\b(avx512_vnni|avx_vnni)\b/.test(flags));
  },
);
