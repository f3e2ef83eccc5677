/** A small Llama with random weights: every part of a real one, quick enough for plain loops. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { seededRandom } from '../../gpu-backend/engine/random.ts';
import type { Runner } from '../../gpu-backend/engine/runner.ts';
import { openRunner } from '../../gpu-backend/engine/runner.ts';
import { emitModel } from '../../gpu-backend/model/emit.ts';
import type { LlamaConfig, WeightKind, WeightSource } from '../../gpu-backend/model/types.ts';

export const TINY_CONFIG: LlamaConfig = {
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

export function randomLlama(changes: Partial<LlamaConfig> = {}): WeightSource {
  const config = { ...TINY_CONFIG, ...changes };
  const { hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D, vocabularySize: V } = config;
  const shapes: [RegExp, number[]][] = [
    [/embed_tokens|lm_head/, [V, H]],
    [/q_proj/, [N * D, H]],
    [/[kv]_proj/, [G * D, H]],
    [/o_proj/, [H, N * D]],
    [/gate_proj|up_proj/, [F, H]],
    [/down_proj/, [H, F]],
    [/norm/, [H]],
  ];
  const shape = (name: string) => shapes.find(([pattern]) => pattern.test(name))![1];
  return {
    config,
    has: () => true,
    shape,
    async read(name) {
      const random = seededRandom(
        [...name].reduce((sum, char) => sum * 31 + char.charCodeAt(0), 7) % 2 ** 40,
      );
      const [rows, columns] = shape(name);
      if (columns === undefined) return Float32Array.from({ length: rows! }, () => 0.5 + random());
      const scale = 3 / Math.sqrt(columns);
      return Float32Array.from({ length: rows! * columns }, () => (random() - 0.5) * scale);
    },
  };
}

/** Emits `source` into a folder of its own and opens it; disposing removes both. */
export async function openEmitted(source: WeightSource, kind: WeightKind): Promise<Runner & AsyncDisposable> {
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-model-'));
  await emitModel(source, kind, folder, () => {});
  const runner = await openRunner(folder, source.config, { threads: 1 });
  return {
    ...runner,
    async [Symbol.asyncDispose]() {
      await runner.close();
      await rm(folder, { recursive: true });
    },
  };
}
