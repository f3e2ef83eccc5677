/** The walk itself: what it refuses, what it leaves out, and branches. */
import { describe, expect, test } from 'vitest';
import { gradients } from '../../../../gpu-backend/learning/autodiff/gradients.ts';
import { asksForRecompute, keptBytes } from '../../../../gpu-backend/learning/gates/gate-graph.ts';
import { encodeModel } from '../../../../gpu-backend/onnx/encode.ts';
import { GraphBuilder, MICROSOFT } from '../../../../gpu-backend/onnx/graph.ts';
import { createSession, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { weightedSum, worstError } from './finite-differences.ts';

describe('refusals', () => {
  test('an operator without a rule is named', () => {
    const g = new GraphBuilder('g');
    const x = g.input('x', 'f32', [3]);
    const { seed } = weightedSum(g, g.op('Erf', [x]));
    expect(() => gradients(g, [seed], [x])).toThrow(/no gradient rule for Erf/);
  });

  test('a target that the loss does not depend on is named', () => {
    const g = new GraphBuilder('g');
    const [x, unused] = [g.input('x', 'f32', [3]), g.input('unused', 'f32', [3])];
    const { seed } = weightedSum(g, x);
    expect(() => gradients(g, [seed], [x, unused])).toThrow(/does not depend on unused/);
  });

  test('quantized weights without a transposed copy are named', () => {
    const g = new GraphBuilder('g');
    const x = g.input('x', 'f32', [1, 32]);
    const w = g.input('w', 'u8', [8, 1, 32]);
    const y = g.op('MatMulNBits', [x, w, g.input('s', 'f32', [8, 1])], { K: 32, N: 8, bits: 8 });
    expect(() => gradients(g, [weightedSum(g, y).seed], [x])).toThrow(/transposed copy .* w/);
  });
});

test('what does not lead from a target to the loss is not differentiated, and needs no rule', () => {
  const g = new GraphBuilder('g');
  const [x, other] = [g.input('x', 'f32', [64, 64]), g.input('other', 'f32', [64, 64])];
  const costly = g.op('Erf', [g.op('MatMul', [other, g.op('MatMul', [other, other])])]);
  const aside = g.op('Erf', [g.op('MatMul', [x, x])]);
  const { seed } = weightedSum(g, g.op('Mul', [x, costly]));
  g.output(aside, 'f32', [64, 64]);
  const before = g.graph.nodes.length;
  gradients(g, [seed], [x], { shapes: new Map([[costly.name, [64, 64]]]) });
  expect(g.graph.nodes.slice(before).map(({ op }) => op)).toEqual(['Mul']);
});

test('nodes that end a product are differentiated as one, by its transposed weights alone', async () => {
  const g = new GraphBuilder('g');
  const x = g.input('x', 'f32', [2, 3]);
  // Doubles a row; rounding has no rule.
  const y = g.op('Mul', [g.op('Round', [x]), g.constant('f32', [], [2])]);
  g.endProduct({ input: x.name, weights: 'w', outputs: 3 });
  const { seed } = weightedSum(g, g.op('Mul', [y, x]));
  const before = g.graph.nodes.length;
  const transposed = new Map([
    ['w', (b: GraphBuilder, gradient: { name: string }) => b.op('Neg', [gradient])],
  ]);
  const [found] = gradients(g, [seed], [x], { transposed });
  expect(g.graph.nodes.slice(before).map(({ op }) => op)).toEqual(['Mul', 'Mul', 'Neg', 'Add']);
  expect(g.graph.nodes.at(-1)!.outputs).toEqual([found!.name]);
});

describe('If', () => {
  const build = (g: GraphBuilder, x: { name: string }, z: { name: string }) => {
    const run = g.subgraph('run', (b) => {
      const w = b.constant(
        'f32',
        [4, 4],
        [...Array(16).keys()].map((i) => Math.cos(i)),
      );
      const y = b.op('QuickGelu', [b.op('MatMul', [x, w])], {}, MICROSOFT);
      b.output(b.op('Add', [x, b.op('Mul', [y, z])]), 'f32', [3, 4]);
    });
    const skip = g.subgraph('skip', (b) => b.output(b.op('Identity', [x]), 'f32', [3, 4]));
    return g.op('If', [{ name: 'runs' }], { then_branch: { graph: run }, else_branch: { graph: skip } });
  };

  test.each([
    ['runs', 1],
    ['is skipped', 0],
  ])('a branch that %s', async (_name, runs) => {
    const feeds = { runs: tensor('bool', Uint8Array.of(runs), [1]) };
    expect(await worstError({ inputs: [[3, 4], [1]], build, feeds })).toBeLessThan(2e-3);
  });

  test.each([
    ['keeps', undefined, 3],
    ['computes once more', true, 1],
  ])('a branch that %s what its gradient needs', async (_name, recompute, outputs) => {
    const feeds = { runs: tensor('bool', Uint8Array.of(1), [1]) };
    const options = { recompute };
    expect(await worstError({ inputs: [[3, 4], [1]], build, feeds, options })).toBeLessThan(2e-3);
    const g = new GraphBuilder('g');
    const [x, z] = [g.input('x', 'f32', [3, 4]), g.input('z', 'f32', [1])];
    const { seed } = weightedSum(g, build(g, x, z));
    gradients(g, [seed], [x, z], options);
    const [forward] = g.graph.nodes.filter(({ op }) => op === 'If');
    expect(forward!.outputs).toHaveLength(outputs);
  });

  test('a skipped branch gives exactly no gradient by what only it reads', async () => {
    const g = new GraphBuilder('g');
    const [x, z] = [g.input('x', 'f32', [3, 4]), g.input('z', 'f32', [1])];
    g.input('runs', 'bool', [1]);
    const { seed } = weightedSum(g, build(g, x, z));
    const [dz] = gradients(g, [seed], [z]);
    g.output(dz!, 'f32', [1]);
    const session = await createSession(encodeModel(g.graph), { threads: 1 });
    const dzAt = async (runs: number) => {
      const outputs = await session.run(
        {
          x: tensor('f32', new Float32Array(12).fill(1), [3, 4]),
          z: tensor('f32', Float32Array.of(1), [1]),
          runs: tensor('bool', Uint8Array.of(runs), [1]),
        },
        [dz!.name],
      );
      return floats(outputs[dz!.name]!)[0]!;
    };
    expect(await dzAt(0)).toBe(0);
    expect(await dzAt(1)).not.toBe(0);
    await session.release();
  });
});

test('what is kept is held against the memory that there is', () => {
  const g = new GraphBuilder('g');
  const shape = ['B', 'S', 10];
  const branch = (name: string) =>
    g.subgraph(name, (b) => {
      for (let i = 0; i < 3; i++) b.output(b.op('Identity', [{ name: 'x' }]), 'f32', shape);
    });
  g.ops('If', [{ name: 'runs' }], 3, {
    then_branch: { graph: branch('then') },
    else_branch: { graph: branch('else') },
  });
  expect(keptBytes(g.graph)).toBe(2 * 6 * 128 * 10 * 4);
  expect(asksForRecompute(g.graph, 3 * 61_440 + 3)).toBe(false);
  expect(asksForRecompute(g.graph, 3 * 61_440 - 3)).toBe(true);
});
