/**
 * The BERT encoder as an ONNX graph, in fp32: the graph of full sentence encoders (`encoder/sentence-encoder.ts`).
 * Post-norm layers as in Devlin et al., 2018. Shapes: B = sequences, S = tokens, H = hidden.
 *
 * Inputs: `token_ids` i64 [B, S] and `token_mask` i32 [B, S] (1 = a token, 0 = padding).
 * Output: `pooled` f32 [B, H]: the last hidden states' sum over the tokens (equal to the mean once normalised), or the
 * first token's last hidden state.
 */
import { z } from 'zod';
import type { Graph, Value } from '../../onnx/graph.ts';
import { GraphBuilder, MICROSOFT } from '../../onnx/graph.ts';
import type { SafetensorsFile } from '../formats/safetensors.ts';
import { transpose } from './rotation.ts';

/** The fields of a BERT checkpoint's `config.json` that the graph depends on. */
export const bertConfigSchema = z.looseObject({
  model_type: z.literal('bert'),
  hidden_act: z.literal('gelu'),
  position_embedding_type: z.literal('absolute').default('absolute'),
  hidden_size: z.int().min(1).max(8192),
  intermediate_size: z.int().min(1).max(65_536),
  num_attention_heads: z.int().min(1).max(256),
  num_hidden_layers: z.int().min(1).max(256),
  max_position_embeddings: z.int().min(2).max(65_536),
  vocab_size: z.int().min(1).max(1_000_000),
  layer_norm_eps: z.number().positive(),
});
export type BertConfig = z.infer<typeof bertConfigSchema>;
/** How the token vectors of a text become one vector. */
export type Pooling = 'mean' | 'cls';

/** Weights by the names of the checkpoint, e.g. `encoder.layer.0.attention.self.query.weight`. */
type BertWeights = Pick<SafetensorsFile, 'has' | 'shape' | 'read'>;

/** Shared by all parts of the graph. */
type Context = { readonly g: GraphBuilder; readonly config: BertConfig; readonly weights: BertWeights };

/** @throws RangeError when a tensor is missing or has another shape than the configuration says. */
export async function bertGraph(config: BertConfig, weights: BertWeights, pooling: Pooling): Promise<Graph> {
  const g = new GraphBuilder('bert');
  const context: Context = { g, config, weights };
  const tokenIds = g.input('token_ids', 'i64', ['B', 'S']);
  const tokenMask = g.input('token_mask', 'i32', ['B', 'S']);
  let hidden = await embed(context, tokenIds);
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    hidden = await encoderLayer(context, `encoder.layer.${layer}`, hidden, tokenMask);
  }
  g.output({ name: 'pooled' }, 'f32', ['B', config.hidden_size]);
  if (pooling === 'cls') {
    g.node('Gather', [hidden, g.constant('i64', [], [0])], ['pooled'], { axis: 1 });
    return g.graph;
  }
  const kept = g.op('Unsqueeze', [g.op('Cast', [tokenMask], { to: 1 }), g.ints(2)]);
  g.node('ReduceSum', [g.op('Mul', [hidden, kept]), g.ints(1)], ['pooled'], {
    keepdims: 0,
  });
  return g.graph;
}

/** Word, position and first-segment embeddings, normalised: `[B, S, H]`. */
async function embed(context: Context, tokenIds: Value): Promise<Value> {
  const { g, config } = context;
  const { hidden_size: H, max_position_embeddings: P, vocab_size: V } = config;
  const words = await weight(context, 'embeddings.word_embeddings.weight', [V, H]);
  const positions = await read(context, 'embeddings.position_embeddings.weight', [P, H]);
  const segment = await read(context, 'embeddings.token_type_embeddings.weight', [2, H]);
  for (let i = 0; i < positions.length; i++) positions[i] = positions[i]! + segment[i % H]!;
  const table = initializer(g, 'positions', [P, H], positions);
  const tokenCount = g.op('Shape', [tokenIds], { start: 1, end: 2 });
  const first = g.ints(0);
  const used = g.op('Slice', [table, first, tokenCount, first]);
  const sum = g.op('Add', [g.op('Gather', [words, tokenIds]), used]);
  const norm = await normWeights(context, 'embeddings.LayerNorm');
  return g.op('LayerNormalization', [sum, ...norm], epsilon(config));
}

async function encoderLayer(context: Context, name: string, input: Value, mask: Value): Promise<Value> {
  const { g, config } = context;
  const { hidden_size: H, intermediate_size: F, num_attention_heads: N } = config;
  const self = `${name}.attention.self`;
  const [q, k, v] = [
    await project(context, `${self}.query`, input, H, H),
    await project(context, `${self}.key`, input, H, H),
    await project(context, `${self}.value`, input, H, H),
  ];
  const attended = g.op('MultiHeadAttention', [q, k, v, undefined, mask], { num_heads: N }, MICROSOFT);
  const output = await project(context, `${name}.attention.output.dense`, attended, H, H);
  const hidden = await addAndNormalise(context, `${name}.attention.output.LayerNorm`, output, input);
  const wide = await product(context, `${name}.intermediate.dense`, hidden, H, F);
  const bias = await weight(context, `${name}.intermediate.dense.bias`, [F]);
  const active = g.op('BiasGelu', [wide, bias], {}, MICROSOFT);
  const narrow = await project(context, `${name}.output.dense`, active, F, H);
  return addAndNormalise(context, `${name}.output.LayerNorm`, narrow, hidden);
}

async function addAndNormalise(context: Context, name: string, a: Value, b: Value): Promise<Value> {
  const norm = await normWeights(context, name);
  return context.g.op(
    'SkipLayerNormalization',
    [a, b, ...norm],
    { epsilon: epsilon(context.config).epsilon },
    MICROSOFT,
  );
}

const epsilon = (config: BertConfig) => ({ axis: -1, epsilon: { float: config.layer_norm_eps } });

async function normWeights(context: Context, name: string): Promise<Value[]> {
  const shape = [context.config.hidden_size];
  return [await weight(context, `${name}.weight`, shape), await weight(context, `${name}.bias`, shape)];
}

/** `x · Wᵀ + b`. */
async function project(
  context: Context,
  name: string,
  x: Value,
  inputs: number,
  outputs: number,
): Promise<Value> {
  const bias = await weight(context, `${name}.bias`, [outputs]);
  return context.g.op('Add', [await product(context, name, x, inputs, outputs), bias]);
}

/** `x · Wᵀ`. `MatMul` takes `[in, out]`, so the matrix is transposed here, once. */
async function product(
  context: Context,
  name: string,
  x: Value,
  inputs: number,
  outputs: number,
): Promise<Value> {
  const values = await read(context, `${name}.weight`, [outputs, inputs]);
  const matrix = initializer(
    context.g,
    `${name}.transposed`,
    [inputs, outputs],
    transpose(values, outputs, inputs),
  );
  return context.g.op('MatMul', [x, matrix]);
}

const weight = async (context: Context, name: string, shape: readonly number[]): Promise<Value> =>
  initializer(context.g, name, shape, await read(context, name, shape));

const initializer = (g: GraphBuilder, name: string, shape: readonly number[], values: Float32Array): Value =>
  g.initializer(name, 'f32', shape, {
    kind: 'inline',
    bytes: new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
  });

async function read({ weights }: Context, name: string, shape: readonly number[]): Promise<Float32Array> {
  if (!weights.has(name)) throw new RangeError(`the encoder's weights lack ${name}`);
  const found = weights.shape(name);
  if (found.join() !== shape.join()) {
    throw new RangeError(`${name} has shape [${found}], the configuration says [${shape}]`);
  }
  return weights.read(name);
}
