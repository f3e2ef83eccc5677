/** Products of large matrices in memory, by the runtime: a loop in JavaScript takes thirty times as long. */
import { encodeModel } from '../../onnx/encode.ts';
import { GraphBuilder, MICROSOFT } from '../../onnx/graph.ts';
import { createSession, floats, tensor } from '../../onnx/session.ts';

export type Products = AsyncDisposable & {
  /** a·bᵀ: `[N, K]`, `[B, K]` → `[N, B]`. */
  multiply(a: Float32Array, b: Float32Array, K: number): Promise<Float32Array>;
};

export async function openProducts(threads: number): Promise<Products> {
  const g = new GraphBuilder('products');
  const [a, b] = [g.input('a', 'f32', ['N', 'K']), g.input('b', 'f32', ['B', 'K'])];
  g.node('FusedMatMul', [a, b], ['c'], { transB: 1 }, MICROSOFT);
  g.output({ name: 'c' }, 'f32', ['N', 'B']);
  const session = await createSession(encodeModel(g.graph), { threads, spinning: false });
  return {
    async multiply(x, y, K) {
      const feeds = {
        a: tensor('f32', x, [x.length / K, K]),
        b: tensor('f32', y, [y.length / K, K]),
      };
      return floats((await session.run(feeds, ['c'])).c!);
    },
    [Symbol.asyncDispose]: () => session.release(),
  };
}
