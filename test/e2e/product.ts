/**
 * `npm start` as a person runs it, on a home and ports of its own. The installed model is linked, not pulled; where nothing of it
 * matters but that it answers, a small one with random weights has its place.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { OpenAI } from 'openai';
import { type DevFile, readDevFile } from '../../gpu-backend/dev/dev-home.ts';
import { maskrouteHome } from '../../gpu-backend/files.ts';
import { DEFAULT_MODEL } from '../../gpu-backend/model/sources/resolve.ts';
import { readMaskSet } from '../../gpu-backend/publication/publish.ts';
import { type ModelHash, maskBits, maskId } from '../../shared/mask/mask.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { TINY_CONFIG } from '../support/random-llama.ts';
import { installTinyModel, TINY_HASH } from '../support/tiny-model.ts';

const READY_WITHIN_ms = 90_000;
const POLL_ms = 50;

export function createHome(): string {
  const home = mkdtempSync(path.join(tmpdir(), 'maskroute-e2e-'));
  const installed = path.join(maskrouteHome(), 'models', DEFAULT_MODEL);
  if (!existsSync(installed)) throw new Error(`${installed} is missing; "npm test" pulls it`);
  mkdirSync(path.join(home, 'models'));
  symlinkSync(installed, path.join(home, 'models', DEFAULT_MODEL));
  return home;
}

/** A start takes half as long here. The model has the default one's name and not its hash: the preset is not for it. */
export async function createTinyHome(): Promise<string> {
  const home = mkdtempSync(path.join(tmpdir(), 'maskroute-e2e-'));
  const folder = path.join(home, 'models', DEFAULT_MODEL);
  const { manifest } = await installTinyModel(folder, 'q8', { contextTokens: TINY_CONTEXT_TOKENS });
  writeFileSync(path.join(folder, 'model.json'), JSON.stringify({ ...manifest, name: DEFAULT_MODEL }));
  return home;
}

/** Answers that do not end by themselves take some seconds. */
export const TINY_CONTEXT_TOKENS = 16_384;

/** The preset's clusters and figures, with masks of the tiny model. */
export async function tinyPreset(): Promise<MaskSet> {
  const { surrogates: _, ...preset } = await readMaskSet(PRESET);
  const blockCount = 2 * TINY_CONFIG.layerCount;
  const hash = TINY_HASH as ModelHash;
  const clusters = preset.clusters.map((cluster, i) => {
    const runs = Uint8Array.from({ length: blockCount }, (_, block) => (block === i % blockCount ? 0 : 1));
    return { ...cluster, bits: maskBits({ runs }), mask: maskId(hash, { runs }) };
  });
  const [sparsity, surrogate] = [1 / blockCount, false];
  return {
    ...preset,
    clusters,
    surrogate,
    targetSparsity: sparsity,
    reachedSparsity: sparsity,
    model: { name: DEFAULT_MODEL, hash, blockCount },
  };
}

export const PRESET = path.resolve('gpu-backend/presets', DEFAULT_MODEL, 'mask-set.json');

/** Does nothing for a home that was never made. */
export function removeHome(home: string | undefined): void {
  if (home !== undefined) rmSync(home, { recursive: true, force: true });
}

/** A start that may succeed or not. */
export type Run = {
  readonly process: ChildProcess;
  readonly output: () => string;
  /** The exit code, or the signal. */
  readonly ended: Promise<number | string>;
};

export const DIRECT = [process.execPath, 'gpu-backend/dev/start.ts'];
export const BY_NPM = ['npm', 'start'];

export function run(home: string, env: Record<string, string> = {}, command = DIRECT): Run {
  const child = spawn(command[0]!, command.slice(1), {
    env: { ...process.env, MASKROUTE_HOME: home, PORT: '0', BACKEND_PORT: '0', ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
  }
  const ended = once(child, 'close').then(([code, signal]) => (code ?? signal) as number | string);
  return { process: child, output: () => output, ended };
}

export type Started = Run & { readonly dev: DevFile; readonly client: OpenAI };

/** Waits for the ready line; dev.json is there by then. (One from a killed run may be there long before.) */
export async function start(
  home: string,
  env: Record<string, string> = {},
  command = DIRECT,
): Promise<Started> {
  const started = run(home, env, command);
  const deadline_ms = performance.now() + READY_WITHIN_ms;
  for (;;) {
    if (started.output().includes('is ready at')) {
      const dev = (await readDevFile(home))!;
      return { ...started, dev, client: clientOf(dev) };
    }
    const ended = await Promise.race([started.ended, new Promise((resolve) => setTimeout(resolve, POLL_ms))]);
    if (ended !== undefined || performance.now() > deadline_ms) {
      // Else the next start in this home would be refused.
      await stop(started);
      throw new Error(`the product did not start (${ended}): ${started.output()}`);
    }
  }
}

export async function stop(started: Run, signal: NodeJS.Signals = 'SIGTERM'): Promise<number | string> {
  started.process.kill(signal);
  return started.ended;
}

/** Without retries, so that a test sees what one request gets. */
export const clientOf = ({ edge, apiKey }: DevFile): OpenAI =>
  new OpenAI({ baseURL: `${edge}/v1`, apiKey, maxRetries: 0 });
