/** The benches of a GPU as a person runs them, on lavapipe, with a small model in the default one's place; the CPU's on that model. */
import { execFile } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { benchBatch } from '../../../gpu-backend/bench/batch.ts';
import { openLlamaCppPeers } from '../../../gpu-backend/bench/decode.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH } from '../../../gpu-backend/model/sources/resolve.ts';
import { testDevice } from '../../support/lavapipe.ts';
import { installTinyModel } from '../../support/tiny-model.ts';

const NEVER = new AbortController().signal;
const POSITIVE = expect.toSatisfy((value: number) => value > 0);

let home: string;
beforeAll(async () => {
  testDevice();
  home = await mkdtemp(join(tmpdir(), 'maskroute-device-bench-'));
  const shape = { layerCount: 1, vocabularySize: 2048, contextTokens: 1024 };
  const { folder, manifest } = await installTinyModel(join(home, 'models', DEFAULT_MODEL), 'q8', shape);
  await writeFile(join(folder, 'model.json'), JSON.stringify({ ...manifest, name: DEFAULT_MODEL }));
});
afterAll(() => rm(home, { recursive: true }));

/** What was said, line by line, and the figures of the last line. */
async function bench(...args: string[]) {
  const { stdout } = await promisify(execFile)(
    process.execPath,
    ['bin/maskroute.js', 'bench', ...args, '--device', 'webgpu', '--rounds', '1'],
    { env: { ...process.env, MASKROUTE_HOME: home } },
  );
  const lines = stdout.trimEnd().split('\n');
  return { lines, figures: JSON.parse(lines.at(-1)!) };
}

test('llama.cpp that is not there is left out, with the reason, and so it is for a model of another file', async () => {
  const said: string[] = [];
  const peersFor = (hash: string) =>
    openLlamaCppPeers(
      home,
      hash,
      (line) => said.push(line),
      async () => ['a peer'],
    );
  expect(await peersFor('of another file')).toEqual({ peers: [], missing: {} });
  expect(said).toEqual([]);
  const llamaCppProblem = "the model's GGUF file is not there";
  expect(await peersFor(DEFAULT_MODEL_HASH)).toEqual({
    peers: [],
    missing: { llamaCpp: null, llamaCppProblem },
  });
  expect(said).toEqual([`llama.cpp is left out: ${llamaCppProblem}`]);
});

test('many streams on the CPU, of a model whose context is shorter than the usual long prompt', async () => {
  const options = { home, model: DEFAULT_MODEL, rounds: 1, say: () => {}, signal: NEVER };
  expect(await benchBatch(options)).toMatchObject({
    bench: 'batch',
    model: DEFAULT_MODEL,
    eightStreams_tokensPerSecond: { 64: POSITIVE, 440: POSITIVE, mixed: POSITIVE },
    gapPrompt_ms: POSITIVE,
    gapPromptTokens: 1023,
  });
}, 120_000);

const ADAPTER = process.platform === 'linux' ? expect.stringContaining('llvmpipe') : expect.any(String);

test('decoding: the adapter, its times, and why nothing is said of the bandwidth of a CPU', async () => {
  const { lines, figures } = await bench('decode');
  expect(figures).toMatchObject({
    bench: 'decode',
    device: 'webgpu',
    adapter: ADAPTER,
    llamaCpp: 'not measured',
    at64: { dense_ms: POSITIVE, quarter_ms: POSITIVE, weightsRead_GBps: expect.any(Number) },
    at512: { dense_ms: POSITIVE },
  });
  if (process.platform !== 'linux') return;
  expect(figures).toMatchObject({ floatType: 'f16', bandwidth_GBps: null, at64: { bandwidthShare: null } });
  expect(lines[0]).toMatch(/^on llvmpipe.*, through WebGPU in f16$/);
  expect(lines[1]).toMatch(/compute on the CPU.*bandwidth is not measured/);
}, 120_000);

test('many streams: the adapter, and tokens a second under one mask and under eight', async () => {
  const { lines, figures } = await bench('batch', '--float-type', 'f32', '--json');
  expect(lines).toHaveLength(1);
  expect(figures).toMatchObject({
    bench: 'batch',
    device: 'webgpu',
    adapter: ADAPTER,
    floatType: 'f32',
    streams: 8,
    oneStream_tokensPerSecond: POSITIVE,
    eightStreams_tokensPerSecond: POSITIVE,
    eightOneMask_tokensPerSecond: POSITIVE,
    eightMasks_tokensPerSecond: POSITIVE,
  });
}, 120_000);
