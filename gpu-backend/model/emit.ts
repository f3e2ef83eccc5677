/** Writes an imported model's graphs and weights file, which the engine opens. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeModel } from '../onnx/encode.ts';
import type { Graph } from '../onnx/graph.ts';
import { queryScale, readExtras, storeExtras } from './architectures/attention-extras.ts';
import { batchedLlamaGraph } from './architectures/batched-llama.ts';
import type { StoredLayer, StoredLlama } from './architectures/llama.ts';
import { llamaGraph } from './architectures/one-mask-llama.ts';
import type {
  StoredEmbedding,
  StoredLinear,
  StoredRows,
  VocabularyMatrix,
} from './architectures/projections.ts';
import { reserveLinear, storeCodes, storeLinear, storeRotation } from './architectures/projections.ts';
import type { Basis } from './architectures/rotation.ts';
import { fileBasis, rotatedBasis } from './architectures/rotation.ts';
import { convertSlices, type Job } from './conversion/convert-slices.ts';
import type { Turn } from './conversion/slice.ts';
import type { LayerProduct, PostNorms } from './matrices.ts';
import { eachProduct, headMatrix, layerMatrices, readPostNorms, stackRows } from './matrices.ts';
import {
  type CalibratedKind,
  type FileSource,
  type ModelConfig,
  unsupportedModel,
  type WeightKind,
} from './model-source.ts';
import type { Quantizer, TextOptions } from './quantization/calibration.ts';
import { openColumns } from './quantization/columns.ts';
import { openFourBits } from './quantization/four-bits.ts';
import {
  eightBitsOf,
  FOUR_BITS,
  type MatrixForm,
  PLAIN_8_BITS,
  QUANT_BLOCK,
  type QuantForm,
} from './quantization/quantize.ts';
import { localRopeConfig, ropeTables } from './rope.ts';
import { WeightsFile } from './weights-file.ts';

export const MODEL_FILE = 'model.onnx';
/** The graph for many sequences at once, over the same weights. */
export const BATCHED_MODEL_FILE = 'model-batched.onnx';
export const WEIGHTS_FILE = 'weights.bin';

/** The format of the weights. A kind alone is rounded to nearest; with options it is calibrated on text. */
export type Holding = WeightKind | (TextOptions & { readonly kind: CalibratedKind });

/** The source of tensors, the file to write, and the basis of the residual stream. */
type Emission = {
  readonly source: FileSource;
  readonly file: WeightsFile;
  readonly basis: Basis;
};

/**
 * Writes the weights and both graphs into `outDir`. Threads convert matrices in slices, so memory does not grow with the
 * model; only calibration on text needs whole layers in memory. `onProgress` gets the fraction done, 0 to 1; when it throws, the
 * work ends.
 * @throws MaskrouteError `unsupported_model` for widths that codes cannot have, `corrupt_model`.
 */
export async function emitModel(
  source: FileSource,
  holding: Holding,
  outDir: string,
  onProgress: (fraction: number) => void,
  threads?: number,
): Promise<void> {
  if (holding !== 'f32') requireBlocks(source.config);
  // fp32 is the reference, so it keeps the file's basis; a rotation makes quantized weights more precise.
  const kind = typeof holding === 'string' ? holding : holding.kind;
  const basis = kind === 'f32' ? fileBasis : rotatedBasis(source.config, kind !== 'q8');
  const file = new WeightsFile(join(outDir, WEIGHTS_FILE), WEIGHTS_FILE);
  const emission = { source, file, basis };
  try {
    const stored =
      typeof holding === 'string'
        ? await storeInSlices(emission, formsOf(holding, source.config), onProgress, threads)
        : await storeByText(emission, holding, onProgress);
    writeGraphs(outDir, source.config, stored);
  } finally {
    file.close();
  }
}

export function writeGraphs(folder: string, config: ModelConfig, stored: StoredLlama): void {
  const write = (file: string, graph: Graph) =>
    writeFileSync(join(folder, file), encodeModel(graph), { flush: true });
  write(MODEL_FILE, llamaGraph(config, stored));
  write(BATCHED_MODEL_FILE, batchedLlamaGraph(config, stored));
}

/** @throws MaskrouteError `unsupported_model` for a model whose rows are no whole blocks of codes. */
function requireBlocks({ hiddenSize, ffnSize, headCount, headSize }: ModelConfig): void {
  const widths = [
    [`its hidden size is ${hiddenSize}`, hiddenSize],
    [`its FFN size is ${ffnSize}`, ffnSize],
    [`its heads are ${headCount * headSize} wide together`, headCount * headSize],
  ] as const;
  const odd = widths.find(([, width]) => width % QUANT_BLOCK !== 0);
  if (odd === undefined) return;
  throw unsupportedModel(
    `${odd[0]}, and eight or four bits need multiples of ${QUANT_BLOCK}; use --weights f32`,
  );
}

/** `undefined`: fp32. */
type Forms = {
  readonly embedding: QuantForm | undefined;
  readonly head: MatrixForm | undefined;
  readonly layers: MatrixForm | undefined;
};

function formsOf(kind: WeightKind, { hiddenSize }: ModelConfig): Forms {
  const eightBits = eightBitsOf(hiddenSize);
  switch (kind) {
    case 'f32':
      return { embedding: undefined, head: undefined, layers: undefined };
    case 'q8':
      return { embedding: PLAIN_8_BITS, head: PLAIN_8_BITS, layers: PLAIN_8_BITS };
    case 'q4':
      return { embedding: eightBits, head: eightBits, layers: FOUR_BITS };
    case 'q8-columns':
      return { embedding: eightBits, head: 'columns', layers: 'columns' };
  }
}

/** Writes the last norm and the rotary tables. */
function storeRest(
  { source, file, basis }: Emission,
  finalNorm: Float32Array,
): Pick<StoredLlama, 'finalNorm' | 'ropeCos' | 'ropeSin' | 'localRope'> {
  const { config } = source;
  const store = (tables: readonly [Float32Array, Float32Array]) => ({
    cos: file.append(tables[0]),
    sin: file.append(tables[1]),
  });
  const stored = file.append(basis.norm(finalNorm));
  const { cos, sin } = store(ropeTables(config));
  const localRope = config.localRope && store(ropeTables(localRopeConfig(config, config.localRope)));
  return { finalNorm: stored, ropeCos: cos, ropeSin: sin, localRope };
}

/** Eight bits lose a value that is smaller than this share of the largest. */
const NORM_SHARE_MIN = 1 / 256;

/**
 * Whether tied embedding and head are stored once. The embedding is then the head's rows divided by the last norm's weights
 * (`Basis.embeddingFromHead`), and a weight near 0 would leave only noise. A head by column has no rows.
 */
function isShared(
  { source, basis }: Emission,
  head: VocabularyMatrix,
  finalNorm: Float32Array,
): head is VocabularyMatrix<StoredRows> {
  if (!source.config.tiedEmbeddings || head.some(({ kind }) => kind === 'q8-columns')) return false;
  if (basis === fileBasis) return true;
  const sizes = finalNorm.map(Math.abs);
  const largest = sizes.reduce((most, size) => Math.max(most, size), 0);
  return sizes.every((size) => size > NORM_SHARE_MIN * largest);
}

/** The embedding when it is stored once with the head. */
function tiedEmbedding(
  { source, file, basis }: Emission,
  head: VocabularyMatrix<StoredRows>,
  finalNorm: Float32Array,
): StoredEmbedding {
  const correction = basis.embeddingFromHead(finalNorm);
  const range = correction && file.append(correction);
  return { rows: head, correction: range && { values: range, size: source.config.hiddenSize } };
}

/* In slices: first reserve the places of all matrices, then convert them. */

/** Weights of a slice: enough work for a thread, small enough to have many in memory. */
const SLICE_WEIGHTS = 2 ** 22;

async function storeInSlices(
  emission: Emission,
  forms: Forms,
  onProgress: (fraction: number) => void,
  threads: number | undefined,
): Promise<StoredLlama> {
  const { stored, jobs } = await placeAll(emission, forms);
  const total = jobs.reduce((sum, { slice }) => sum + slice.rows * slice.columns, 0);
  let done = 0;
  await convertSlices(jobs, emission.file.descriptor, {
    threads,
    onWeights(weights) {
      done += weights;
      onProgress(done / total);
    },
  });
  return stored;
}

/** Reserves the places of all matrices, and stores what is no matrix. */
async function placeAll(
  emission: Emission,
  forms: Forms,
): Promise<{ readonly stored: StoredLlama; readonly jobs: readonly Job[] }> {
  const { source, file, basis } = emission;
  const { config } = source;
  const jobs: Job[] = [];
  const place = (
    names: readonly string[],
    form: MatrixForm | undefined,
    turn: (name: string) => Turn,
  ): StoredLinear => {
    const { stored, jobs: own } = placeMatrix(emission, names, form, turn);
    jobs.push(...own);
    return stored;
  };
  const reads = (norm: Float32Array, { scale = 1, inside = 1 } = {}): Turn => ({
    kind: 'reads',
    norm,
    scale,
    stream: basis.stream,
    inside,
  });
  const embeds = (): Turn => ({ kind: 'embeds', stream: basis.stream });
  const insideHeads = basis.inside(config.headSize);
  const insideFfn = basis.inside(config.ffnSize);
  const rotation = storeRotation(file, insideFfn);
  const finalNorm = await source.read('model.norm.weight');
  const headName = config.tiedEmbeddings ? 'model.embed_tokens.weight' : 'lm_head.weight';
  const head = [place([headName], forms.head, () => reads(finalNorm))];
  const embedding = isShared(emission, head, finalNorm)
    ? tiedEmbedding(emission, head, finalNorm)
    : {
        // Its form is never by column.
        rows: [place(['model.embed_tokens.weight'], forms.embedding, embeds) as StoredRows],
        correction: undefined,
      };
  const layers: StoredLayer[] = [];
  for (let index = 0; index < config.layerCount; index++) {
    const layer = `model.layers.${index}`;
    const named = (...names: string[]) => names.map((name) => `${layer}.${name}.weight`);
    const attentionNorm = await source.read(`${layer}.input_layernorm.weight`);
    const ffnNorm = await source.read(`${layer}.post_attention_layernorm.weight`);
    const qkv = named('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj');
    const [q, , v] = qkv;
    const readsQkv = (name: string) =>
      reads(attentionNorm, {
        scale: name === q ? queryScale(config) : 1,
        inside: name === v ? insideHeads : 1,
      });
    const writes = (inside: number) => (): Turn => ({ kind: 'writes', written: basis.written, inside });
    const down = place(named('mlp.down_proj'), forms.layers, writes(insideFfn));
    layers.push({
      qkv: place(qkv, forms.layers, readsQkv),
      output: place(named('self_attn.o_proj'), forms.layers, writes(insideHeads)),
      gateUp: place(named('mlp.gate_proj', 'mlp.up_proj'), forms.layers, () => reads(ffnNorm)),
      down: { ...down, ...rotation },
      attentionNorm: file.append(basis.norm(attentionNorm)),
      ffnNorm: file.append(basis.norm(ffnNorm)),
      ...storePostNorms(file, await readPostNorms(source, index)),
      ...storeExtras(file, await readExtras(source, basis, index)),
    });
  }
  return { stored: { layers, embedding, head, ...storeRest(emission, finalNorm) }, jobs };
}

/** In the file's own basis, only the scale of Q remains. */
const plainTurn = (turn: Turn): Turn =>
  turn.kind === 'reads' && turn.scale !== 1 ? { kind: 'scaled', scale: turn.scale } : { kind: 'none' };

/** Reserves one place for the named matrices, stacked by rows, and cuts them into slices. */
function placeMatrix(
  { source, file, basis }: Emission,
  names: readonly string[],
  form: MatrixForm | undefined,
  turnOf: (name: string) => Turn,
): { stored: StoredLinear; jobs: Job[] } {
  const columns = source.shape(names[0]!)[1]!;
  const heights = names.map((name) => source.shape(name)[0]!);
  const outputs = heights.reduce((sum, height) => sum + height, 0);
  const stored = reserveLinear(file, form, outputs, columns);
  // Each of the parts of a matrix is rows of equal length; by column, a row's codes are a byte apart.
  const at = (range: { offset: number; bytes: number }, row: number) =>
    range.offset + (range.bytes / outputs) * row;
  const valuesAt = (row: number) =>
    stored.kind === 'q8-columns' ? stored.values.offset + row : at(stored.values, row);
  const { headSize } = source.config;
  const step = headSize * Math.max(1, Math.floor(SLICE_WEIGHTS / columns / headSize));
  const jobs: Job[] = [];
  let above = 0;
  for (const [i, name] of names.entries()) {
    const turn = basis === fileBasis ? plainTurn(turnOf(name)) : turnOf(name);
    const height = heights[i]!;
    for (let from = 0; from < height; ) {
      const rows = turn.kind === 'writes' ? height : Math.min(step, height - from);
      const row = above + from;
      jobs.push({
        place: source.place(name),
        slice: {
          from,
          rows,
          columns,
          outputs,
          turn,
          form,
          valuesAt: valuesAt(row),
          scalesAt: 'scales' in stored ? at(stored.scales, row) : 0,
          zeroPointsAt: 'zeroPoints' in stored ? at(stored.zeroPoints, row) : 0,
        },
      });
      from += rows;
    }
    above += height;
  }
  return { stored, jobs };
}

/* Calibrated on text: layer after layer, each whole in memory. */

async function storeByText(
  emission: Emission,
  { kind, ...options }: Extract<Holding, object>,
  onProgress: (fraction: number) => void,
): Promise<StoredLlama> {
  const { source, file, basis } = emission;
  const { layerCount } = source.config;
  const open = kind === 'q4' ? openFourBits : openColumns;
  const quantizer = await open(source, basis, options, onProgress);
  const forms = formsOf(kind, source.config);
  const finalNorm = await source.read('model.norm.weight');
  const head = quantizer
    .head(await headMatrix(source, basis, finalNorm))
    .map((codes) => storeCodes(file, codes));
  const embedded = async () => basis.embeds(await stackRows(source, ['model.embed_tokens.weight']));
  const embedding = isShared(emission, head, finalNorm)
    ? tiedEmbedding(emission, head, finalNorm)
    : { rows: [storeLinear(file, forms.embedding, await embedded())], correction: undefined };
  const layers: StoredLayer[] = [];
  const rotation = storeRotation(file, basis.inside(source.config.ffnSize));
  for (let index = 0; index < layerCount; index++) {
    const layer = await storeLayer(emission, quantizer, index);
    layers.push({ ...layer, down: { ...layer.down, ...rotation } });
    onProgress(quantizer.progress + ((1 - quantizer.progress) * (index + 1)) / layerCount);
  }
  return { layers, embedding, head, ...storeRest(emission, finalNorm) };
}

const storePostNorms = (file: WeightsFile, norms: PostNorms | undefined): Pick<StoredLayer, 'postNorms'> =>
  norms === undefined
    ? {}
    : { postNorms: { attention: file.append(norms.attention), ffn: file.append(norms.ffn) } };

async function storeLayer(
  { source, file, basis }: Emission,
  quantizer: Quantizer,
  index: number,
): Promise<StoredLayer> {
  const matrices = await layerMatrices(source, basis, index);
  const codes = quantizer.layer(index, matrices);
  return {
    ...eachProduct((name: LayerProduct) => storeCodes(file, codes[name])),
    attentionNorm: file.append(matrices.attentionNorm),
    ffnNorm: file.append(matrices.ffnNorm),
    ...storePostNorms(file, matrices.postNorms),
    ...storeExtras(file, matrices.extras),
  };
}
