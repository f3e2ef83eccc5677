/**
 * How many new tokens of a sequence the device's attention takes at once. From 32 on ONNX Runtime 1.30 runs another kernel, which
 * passes keys around within a subgroup and is wrong where subgroups are narrow (lavapipe's have 4 to 16 lanes). Which devices are
 * concerned is written nowhere, so a device is asked for both, once, when it is opened.
 */
import type { ModelConfig } from '../model/model-source.ts';
import { encodeModel } from '../onnx/encode.ts';
import { GraphBuilder, MICROSOFT } from '../onnx/graph.ts';
import type { RuntimeTensor, Session } from '../onnx/session.ts';
import { createSession, floats, tensor } from '../onnx/session.ts';
import { createRandom } from '../random.ts';

const SAFE_TOKENS = 31;
const PROBE_TOKENS = 48;
const DIFFERENCE_MAX = 1e-3;

/** `Infinity` where the kernel for many tokens agrees with the one for few. */
export async function pieceTokensMax(config: ModelConfig): Promise<number> {
  const session = await openAttention(config);
  try {
    const { queries, keys, values } = someTokens(config);
    const attend = async (from: number, to: number, past: Past) => {
      const cut = (all: Float32Array) => {
        const width = all.length / PROBE_TOKENS;
        return tensor('f32', all.slice(from * width, to * width), [1, to - from, width]);
      };
      const outputs = await session.run(
        {
          ...{ q: cut(queries), k: cut(keys), v: cut(values), past_k: past.k, past_v: past.v },
          last_keys: tensor('i32', Int32Array.of(to - 1), [1]),
          keys_max: tensor('i32', Int32Array.of(to), [1]),
        },
        ['attended', 'k_after', 'v_after'],
      );
      return { attended: floats(outputs.attended!), past: { k: outputs.k_after!, v: outputs.v_after! } };
    };
    const nothing = emptyPast(config);
    const together = await attend(0, PROBE_TOKENS, nothing);
    const first = await attend(0, SAFE_TOKENS, nothing);
    const rest = await attend(SAFE_TOKENS, PROBE_TOKENS, first.past);
    const inPieces = [...first.attended, ...rest.attended];
    const agrees = inPieces.every((value, i) => Math.abs(value - together.attended[i]!) < DIFFERENCE_MAX);
    return agrees ? Number.POSITIVE_INFINITY : SAFE_TOKENS;
  } finally {
    await session.release();
  }
}

type Past = { readonly k: RuntimeTensor; readonly v: RuntimeTensor };

function emptyPast({ kvHeadCount: G, headSize: D }: ModelConfig): Past {
  const zeros = () => tensor('f32', new Float32Array(G * PROBE_TOKENS * D), [1, G, PROBE_TOKENS, D]);
  return { k: zeros(), v: zeros() };
}

function someTokens({ headCount: N, kvHeadCount: G, headSize: D }: ModelConfig) {
  const random = createRandom(17);
  const values = (count: number, scale: number) =>
    Float32Array.from({ length: count }, () => scale * (random.below(2001) / 1000 - 1));
  return {
    queries: values(PROBE_TOKENS * N * D, 4 / Math.sqrt(D)),
    keys: values(PROBE_TOKENS * G * D, 1),
    values: values(PROBE_TOKENS * G * D, 1),
  };
}

function openAttention({ headCount: N, kvHeadCount: G, headSize: D }: ModelConfig): Promise<Session> {
  const g = new GraphBuilder('attention_probe');
  const cache = (name: string) => g.input(name, 'f32', [1, G, 'T', D]);
  const inputs = [
    g.input('q', 'f32', [1, 'S', N * D]),
    g.input('k', 'f32', [1, 'S', G * D]),
    g.input('v', 'f32', [1, 'S', G * D]),
    cache('past_k'),
    cache('past_v'),
    g.input('last_keys', 'i32', [1]),
    g.input('keys_max', 'i32', [1]),
  ];
  const attributes = { num_heads: N, kv_num_heads: G, scale: { float: 1 } };
  g.node('GroupQueryAttention', inputs, ['attended', 'k_after', 'v_after'], attributes, MICROSOFT);
  g.output({ name: 'attended' }, 'f32', [1, 'S', N * D]);
  for (const name of ['k_after', 'v_after']) g.output({ name }, 'f32', [1, G, 'T', D]);
  return createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu' });
}
