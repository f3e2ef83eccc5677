/** A small Llama with random weights: every part of a real one, quick enough for plain loops. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { openRunner } from '../../gpu-backend/engine/runner.ts';
import type { Runner } from '../../gpu-backend/engine/runner-interface.ts';
import { emitModel, type Holding } from '../../gpu-backend/model/emit.ts';
import { decoderTensors, gemmaFactors, layersOf, storedShapes } from '../../gpu-backend/model/families.ts';
import { openSafetensors } from '../../gpu-backend/model/formats/safetensors.ts';
import type {
  CalibratedKind,
  KvType,
  ModelConfig,
  WeightSource,
} from '../../gpu-backend/model/model-source.ts';
import { type SurrogateTable, writeSurrogateGraph } from '../../gpu-backend/model/surrogates.ts';
import type { Device } from '../../gpu-backend/onnx/device.ts';
import { createRandom, seededRandom } from '../../gpu-backend/random.ts';
import type { SurrogatesId } from '../../shared/mask/mask.ts';
import { readAll } from './family-files.ts';
import { writeSafetensors } from './safetensors.ts';

export const TINY_CONFIG: ModelConfig = {
  architecture: 'llama',
  layerCount: 4,
  hiddenSize: 96,
  ffnSize: 160,
  headCount: 6,
  kvHeadCount: 2,
  headSize: 16,
  vocabularySize: 320,
  contextTokens: 512,
  ropeTheta: 10_000,
  rmsEpsilon: 1e-5,
  tiedEmbeddings: true,
};

/** What makes a Gemma 3 of a model with these sizes: every second layer is global. */
export function asGemma(sizes: Partial<ModelConfig> = {}): ModelConfig {
  const config = { ...TINY_CONFIG, ...sizes };
  const layers = layersOf(config.layerCount, (layer) => layer % 2 === 0);
  return {
    ...config,
    architecture: 'gemma3_text',
    headNorms: true,
    postNorms: true,
    activation: 'gelu-tanh',
    slidingWindow: { tokens: 9, layers },
    localRope: { theta: 10_000, layers },
    ropeTheta: 1e6,
    factors: gemmaFactors(config.hiddenSize, config.headSize),
  };
}

export function randomLlama(changes: Partial<ModelConfig> = {}): WeightSource {
  const config = { ...TINY_CONFIG, ...changes };
  const tensors = decoderTensors(config);
  const stored = storedShapes(tensors, ({ hubName }) => hubName);
  const find = (name: string) => tensors.find((tensor) => tensor.name === name)!;
  return {
    config,
    shape: (name) => find(name).shape,
    // A checkpoint has random values by its own names, in stacks, without factors and what readers add.
    async read(name) {
      const { hubName, firstRow, shape, hubAdded, scale } = find(name);
      const [rows, columns = 1] = shape;
      const whole = randomTensor(hubName, stored.get(hubName)!);
      const values = whole.slice(firstRow * columns, (firstRow + rows!) * columns);
      return values.map((value) => Math.fround(value + hubAdded) * scale);
    },
  };
}

/** Of all models of a process: most of them have the same sizes. */
const drawn = new Map<string, Float32Array>();

/** The same values for a name everywhere; scripts that make figures do it, too (`splitmix.py`). */
export function randomTensor(name: string, shape: readonly number[]): Float32Array {
  const key = `${name} ${shape}`;
  const known = drawn.get(key) ?? draw(name, shape);
  drawn.set(key, known);
  return known;
}

function draw(name: string, [rows, columns]: readonly number[]): Float32Array {
  const random = seededRandom([...name].reduce((sum, char) => sum * 31 + char.charCodeAt(0), 7) % 2 ** 40);
  const least = name.endsWith('.bias') ? -0.5 : 0.5;
  if (columns === undefined) return Float32Array.from({ length: rows! }, () => least + random());
  const scale = 3 / Math.sqrt(columns);
  return Float32Array.from({ length: rows! * columns }, () => (random() - 0.5) * scale);
}

/** Of no model that is installed anywhere. */
export const RANDOM_TABLE_ID = `s_${'a'.repeat(24)}` as SurrogatesId;

/** Random surrogates of a random model, large enough to matter. */
export function randomSurrogates({ layerCount, hiddenSize }: ModelConfig, rank: number): SurrogateTable {
  const blockCount = 2 * layerCount;
  const random = seededRandom(11);
  const values = (count: number, scale: number) =>
    Float32Array.from({ length: count }, () => (random() - 0.5) * scale);
  return {
    blockCount,
    hiddenSize,
    rank,
    a: values(blockCount * hiddenSize * rank, 3 / Math.sqrt(hiddenSize)),
    b: values(blockCount * rank * hiddenSize, 3 / Math.sqrt(rank)),
    bias: values(blockCount * hiddenSize, 0.5),
    first: values(blockCount * hiddenSize, 3),
  };
}

/** Calibrated on random tokens: enough for a random model. It takes ten times as long as rounding to nearest. */
export function calibrated(kind: CalibratedKind, { vocabularySize }: ModelConfig): Holding {
  const random = createRandom(21);
  const sequenceTokens = 32;
  const tokenIds = Int32Array.from({ length: 24 * sequenceTokens }, () => random.below(vocabularySize));
  return { kind, text: { tokenIds, sequenceTokens }, threads: 1 };
}

/** As `emitModel`, of weights that no file has: they are written to one. */
export async function emitFromMemory(
  source: WeightSource,
  holding: Holding,
  outDir: string,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-source-'));
  await using opened = new AsyncDisposableStack();
  opened.defer(() => rm(folder, { recursive: true }));
  const path = join(folder, 'model.safetensors');
  await writeFile(path, writeSafetensors(await readAll(source)));
  const { place, close } = await openSafetensors(path);
  opened.defer(close);
  await emitModel({ ...source, place }, holding, outDir, onProgress);
}

/** Emits `source` into a folder of its own and opens it on a device; disposing removes both. */
export async function openEmitted(
  source: WeightSource,
  holding: Holding,
  table?: SurrogateTable,
  device?: Device,
  kvType?: KvType,
): Promise<Runner & AsyncDisposable & { readonly folder: string }> {
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-model-'));
  await emitFromMemory(source, holding, folder, () => {});
  const { config } = source;
  const weights = typeof holding === 'string' ? holding : holding.kind;
  if (table !== undefined) await writeSurrogateGraph(folder, folder, { config, weights }, table);
  const surrogates = table && RANDOM_TABLE_ID;
  const options = { threads: 1, surrogates, device, kvType, batches: true };
  const runner = await openRunner(folder, config, options);
  return {
    ...runner,
    folder,
    async [Symbol.asyncDispose]() {
      await runner.close();
      await rm(folder, { recursive: true });
    },
  };
}
