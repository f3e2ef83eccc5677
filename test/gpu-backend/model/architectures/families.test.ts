/**
 * Every family and variant against transformers: configuration, rotary frequencies, logits dense and masked, prefill and
 * decode, greedy tokens, gradients of gates; from safetensors, in shards, and from GGUF.
 */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { Runner } from '../../../../gpu-backend/engine/runner-interface.ts';
import { nextTokenBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import { openGateSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import type { Holding } from '../../../../gpu-backend/model/emit.ts';
import { openGguf } from '../../../../gpu-backend/model/formats/gguf.ts';
import { configFromHuggingFace } from '../../../../gpu-backend/model/formats/hf-config.ts';
import { openSafetensorsFolder } from '../../../../gpu-backend/model/formats/hf-folder.ts';
import type { WeightSource } from '../../../../gpu-backend/model/model-source.ts';
import { localRopeConfig, ropeFrequencies, ropeTables } from '../../../../gpu-backend/model/rope.ts';
import { denseMask, type Mask } from '../../../../shared/mask/mask.ts';
import {
  canBeGguf,
  ggufParts,
  readAll,
  safetensorsFiles,
  storedTensors,
} from '../../../support/family-files.ts';
import { furthestInRows } from '../../../support/furthest.ts';
import { splitGguf, writeGguf } from '../../../support/gguf.ts';
import { naiveLlama } from '../../../support/naive-llama.ts';
import { calibrated, emitFromMemory, openEmitted, randomLlama } from '../../../support/random-llama.ts';
import figures from './fixtures/families.json' with { type: 'json' };

const { tokens, rows, skipped, gates } = figures;
const DENSE = denseMask(8);
const MASKED: Mask = {
  runs: Uint8Array.from({ length: 8 }, (_, block) => (skipped.includes(block) ? 0 : 1)),
};

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-families-'));
});
afterEach(() => rm(folder, { recursive: true }));

const put = async (files: Record<string, Uint8Array>) => {
  for (const [name, bytes] of Object.entries(files)) await writeFile(path.join(folder, name), bytes);
};

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array) =>
  Buffer.from(buffer, byteOffset, byteLength);

/** Every 16th logit of the rows of the figures. */
function sampled(logits: ArrayLike<number>, width: number): number[][] {
  return rows.map((_, i) => Array.from({ length: width / 16 }, (_, at) => logits[i * width + 16 * at]!));
}

/** Of each family with factors, stacks or norms of its own: tied and not. */
const CALIBRATED = [
  'granite, untied, biases',
  'phi3, no window, tied',
  'gemma3_text, windows between global layers',
];

/** In one chunk, or token by token. */
async function logitsOf(runner: Runner, mask: Mask, decodes: boolean): Promise<number[][]> {
  const cache = runner.newCache();
  const width = runner.config.vocabularySize;
  const plan = { mask, kv: 'preserve' as const };
  if (!decodes) {
    return sampled(await runner.run({ cache, tokenIds: tokens, plan, logitRows: rows }), width);
  }
  const wanted: number[] = [];
  for (const [position, tokenId] of tokens.entries()) {
    const logits = await runner.run({ cache, tokenIds: [tokenId], plan, logitRows: [0] });
    if (rows.includes(position)) wanted.push(...logits);
  }
  return sampled(wanted, width);
}

async function greedyOf(runner: Runner, count: number): Promise<number[]> {
  const cache = runner.newCache();
  const found: number[] = [];
  for (let next = tokens; found.length < count; next = [found.at(-1)!]) {
    const plan = { mask: DENSE, kv: 'preserve' as const };
    const logits = await runner.run({ cache, tokenIds: next, plan, logitRows: [next.length - 1] });
    found.push(logits.indexOf(logits.reduce((most, one) => Math.max(most, one))));
  }
  return found;
}

async function checkServing(source: WeightSource, variant: (typeof figures.variants)[number]): Promise<void> {
  await using runner = await openEmitted(source, 'f32');
  for (const decodes of [false, true]) {
    expect(furthestInRows(await logitsOf(runner, DENSE, decodes), variant.dense)).toBeLessThan(1e-3);
    expect(furthestInRows(await logitsOf(runner, MASKED, decodes), variant.masked)).toBeLessThan(1e-3);
  }
  expect(await greedyOf(runner, variant.greedy.length)).toEqual(variant.greedy);
}

describe.each(figures.variants)('$name', (variant) => {
  const config = configFromHuggingFace(variant.config);
  const source = randomLlama(config);

  test('rotary frequencies', () => {
    const found = ropeFrequencies(config);
    variant.inverseFrequencies.forEach((value, i) => {
      expect(Math.abs(found[i]! / value - 1)).toBeLessThan(1e-5);
    });
    expect(ropeTables(config)[0][0]).toBeCloseTo(variant.ropeFactor, 5);
    expect(config.localRope === undefined).toBe(variant.localInverseFrequencies === undefined);
    const local = config.localRope && ropeFrequencies(localRopeConfig(config, config.localRope));
    variant.localInverseFrequencies?.forEach((value, i) => {
      expect(Math.abs(local![i]! / value - 1)).toBeLessThan(1e-5);
    });
  });

  test('the naive reference', async () => {
    const naive = await naiveLlama(source);
    const found = tokens.map((tokenId) => naive.next(tokenId, MASKED));
    const wanted = rows.flatMap((row) => Array.from(found[row]!));
    expect(furthestInRows(sampled(wanted, config.vocabularySize), variant.masked)).toBeLessThan(1e-3);
  });

  test('safetensors in three shards: logits and greedy tokens', async () => {
    await put(safetensorsFiles(await storedTensors(source), 3));
    await writeFile(path.join(folder, 'config.json'), JSON.stringify(variant.config));
    const opened = await openSafetensorsFolder(folder);
    expect(opened.config).toEqual(config);
    await checkServing(opened, variant);
    await opened.close();
  });

  test.runIf(canBeGguf(config))('GGUF, whole and in parts: logits and greedy tokens', async () => {
    const parts = await ggufParts(source);
    await put({ 'model.gguf': writeGguf(parts), ...splitGguf(parts, 2) });
    const whole = await openGguf(path.join(folder, 'model.gguf'));
    const split = await openGguf(path.join(folder, 'tiny-00001-of-00002.gguf'));
    expect(split.config).toEqual(whole.config);
    const { architecture: _family, ropeScaling: _scaling, ...rest } = config;
    expect(whole.config).toMatchObject(rest);
    for (const [name, { data }] of await readAll(whole)) {
      expect(Buffer.compare(bytesOf(await split.read(name)), bytesOf(data)), name).toBe(0);
    }
    await checkServing(whole, variant);
    await Promise.all([whole.close(), split.close()]);
  });

  test('loss and gradients of gates', async () => {
    await emitFromMemory(source, 'f32', folder, () => {});
    const session = await openGateSession(folder, config, { threads: 1 });
    const batch = nextTokenBatch(tokens, 1);
    const oneTarget = { ...batch, targetIds: Array.from(batch.targetIds, () => 7) };
    const { loss, gradients } = await session.step(oneTarget, gates);
    await session.close();
    expect(Math.abs(loss / variant.loss - 1)).toBeLessThan(1e-4);
    const typical = Math.hypot(...variant.gradients) / Math.sqrt(8);
    variant.gradients.forEach((value, i) => {
      expect(Math.abs(gradients[i]! - value)).toBeLessThan(1e-3 * Math.max(Math.abs(value), typical));
    });
  });

  /** Relative to the largest logit. */
  async function errorOf(holding: Holding): Promise<number> {
    await using runner = await openEmitted(source, holding);
    const found = await logitsOf(runner, MASKED, false);
    const size = variant.masked.flat().reduce((most, one) => Math.max(most, Math.abs(one)), 0);
    return furthestInRows(found, variant.masked) / size;
  }

  test('8 bits: the same function within their precision', async () => {
    expect(await errorOf('q8')).toBeLessThan(0.05);
  });

  // Calibration reads the weights for itself, layer by layer.
  test.runIf(CALIBRATED.includes(variant.name)).each([
    ['q4', 0.25],
    ['q8-columns', 0.05],
  ] as const)('%s, calibrated: the same function within its precision', async (kind, most) => {
    expect(await errorOf(calibrated(kind, config))).toBeLessThan(most);
  });
});
