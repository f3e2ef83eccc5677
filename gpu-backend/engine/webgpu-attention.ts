/**
 * Finds how many new tokens of a sequence the device's attention can take at once. From 32 tokens on, ONNX Runtime 1.30
 * uses a kernel that exchanges keys within a subgroup and computes wrong results with narrow subgroups (lavapipe's have 4 to
 * 16 lanes). The affected devices are not documented, so both kernels are compared once, when a device is opened.
 */
import type { ModelConfig } from '../model/model-source.ts';
import { encodeModel } from '../onnx/encode.ts';
import { FLOAT_TYPES, type FloatType, GraphBuilder, MICROSOFT } from '../onnx/graph.ts';
import type { RuntimeTensor, Session } from '../onnx/session.ts';
import { createSession, floatsOrHalves, floatTensor, tensor } from '../onnx/session.ts';
import { createRandom } from '../random.ts';

const SAFE_TOKENS = 31;
const PROBE_TOKENS = 48;
/** fp16 rounding could hide an error that fp32 shows, so both types are compared. */
const DIFFERENCE_MAX = { f32: 1e-3, f16: 1e-2 } as const;

/** `Infinity` when the kernel for many tokens agrees with the kernel for few; otherwise a safe number of tokens. */
export async function pieceTokensMax(config: ModelConfig, floatType: FloatType): Promise<number> {
  for (const type of floatType === 'f32' ? (['f32'] as const) : FLOAT_TYPES)
    if (!(await agrees(config, type))) return SAFE_TOKENS;
  return Number.POSITIVE_INFINITY;
}

async function agrees(config: ModelConfig, type: FloatType): Promise<boolean> {
  const session = await openAttention(config, type);
  try {
    const { queries, keys, values } = someTokens(config);
    const attend = async (from: number, to: number, past: Past) => {
      const cut = (all: Float32Array) => {
        const width = all.length / PROBE_TOKENS;
        return floatTensor(type, all.subarray(from * width, to * width), [1, to - from, width]);
      };
      const outputs = await session.run(
        {
          q: cut(queries),
          k: cut(keys),
          v: cut(values),
          past_k: past.k,
          past_v: past.v,
          last_keys: tensor('i32', Int32Array.of(to - 1), [1]),
          keys_max: tensor('i32', Int32Array.of(to), [1]),
        },
        ['attended', 'k_after', 'v_after'],
      );
      return {
        attended: floatsOrHalves(outputs.attended!),
        past: { k: outputs.k_after!, v: outputs.v_after! },
      };
    };
    const nothing = emptyPast(config, type);
    const together = await attend(0, PROBE_TOKENS, nothing);
    const first = await attend(0, SAFE_TOKENS, nothing);
    const rest = await attend(SAFE_TOKENS, PROBE_TOKENS, first.past);
    const inPieces = [...first.attended, ...rest.attended];
    return inPieces.every((value, i) => Math.abs(value - together.attended[i]!) < DIFFERENCE_MAX[type]);
  } finally {
    await session.release();
  }
}

type Past = { readonly k: RuntimeTensor; readonly v: RuntimeTensor };

function emptyPast({ kvHeadCount: G, headSize: D }: ModelConfig, type: FloatType): Past {
  const zeros = () => floatTensor(type, new Uint8Array(G * PROBE_TOKENS * D), [1, G, PROBE_TOKENS, D]);
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

function openAttention(
  { headCount: N, kvHeadCount: G, headSize: D }: ModelConfig,
  type: FloatType,
): Promise<Session> {
  const g = new GraphBuilder('attention_probe');
  const cache = (name: string) => g.input(name, type, [1, G, 'T', D]);
  const inputs = [
    g.input('q', type, [1, 'S', N * D]),
    g.input('k', type, [1, 'S', G * D]),
    g.input('v', type, [1, 'S', G * D]),
    cache('past_k'),
    cache('past_v'),
    g.input('last_keys', 'i32', [1]),
    g.input('keys_max', 'i32', [1]),
  ];
  const attributes = { num_heads: N, kv_num_heads: G, scale: { float: 1 } };
  g.node('GroupQueryAttention', inputs, ['attended', 'k_after', 'v_after'], attributes, MICROSOFT);
  g.output({ name: 'attended' }, type, [1, 'S', N * D]);
  for (const name of ['k_after', 'v_after']) g.output({ name }, type, [1, G, 'T', D]);
  return createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu' });
}
