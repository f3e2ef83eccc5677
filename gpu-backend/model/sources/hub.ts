/**
 * A model from the Hugging Face hub: the safetensors files and what belongs to them, or a GGUF file. Everything is
 * taken at one commit, and large files are checked against the SHA-256 that the hub publishes.
 * `HF_TOKEN` and `HF_ENDPOINT` are honoured, as in Hugging Face's own tools.
 */
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { fileDownloadInfo, type ListFileEntry, listFiles, modelInfo } from '@huggingface/hub';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { sizeOf } from '../../files.ts';
import type { LocalModel } from '../import-model.ts';
import { type ImportHooks, unsupportedModel } from '../model-source.ts';
import { download, messageOf } from './download.ts';

/** `file`: one GGUF file of the repository. @throws MaskrouteError `download_failed`, `unsupported_model`. */
export async function fetchFromHub(
  repository: string,
  file: string | undefined,
  home: string,
  hooks: ImportHooks,
): Promise<LocalModel> {
  const { commit, entries } = await listRepository(repository, hooks.signal);
  const chosen = chooseFiles(repository, entries, file);
  const folder = join(home, 'sources', 'hub', repository.replace('/', '--'), commit);
  await mkdir(folder, { recursive: true });
  const total = chosen.files.reduce((sum, entry) => sum + entry.size, 0);
  hooks.log(
    `Fetching ${chosen.files.length} files (${Math.ceil(total / 1e6)} MB) of ${repository} from the hub`,
  );
  let before = 0;
  for (const entry of chosen.files) {
    const target = join(folder, entry.path);
    const onBytes = (done: number) =>
      hooks.onProgress({ phase: 'download', done: before + done, total, unit: 'bytes' });
    if ((await sizeOf(target)) !== entry.size) {
      await fetchFile({ repository, commit, entry, target, onBytes, signal: hooks.signal });
    }
    before += entry.size;
    onBytes(0);
  }
  const source = `hf:${repository}@${commit}`;
  if (chosen.kind === 'folder') return { kind: 'folder', path: folder, source };
  const { path } = chosen.files[0]!;
  return { kind: 'gguf', path: join(folder, path), source: `${source}/${path}` };
}

/* What is asked of the hub. */

/** Whether the hub can be reached at all is known quickly, one way or the other. */
const PROBE_TIMEOUT_ms = 3000;
const REQUEST_TIMEOUT_ms = 30_000;

type Signal = AbortSignal | undefined;

function access(timeout_ms: number, signal: Signal) {
  const hubUrl = process.env.HF_ENDPOINT?.replace(/\/+$/, '');
  const accessToken = process.env.HF_TOKEN;
  const bounded: typeof fetch = (input, init) =>
    fetch(input, {
      ...init,
      signal: AbortSignal.any([AbortSignal.timeout(timeout_ms), ...(signal ? [signal] : [])]),
    });
  return { fetch: bounded, ...(hubUrl && { hubUrl }), ...(accessToken && { accessToken }) };
}

async function listRepository(
  name: string,
  signal: Signal,
): Promise<{ commit: string; entries: ListFileEntry[] }> {
  try {
    const probe = access(PROBE_TIMEOUT_ms, signal);
    const commit = String((await modelInfo({ name, additionalFields: ['sha'], ...probe })).sha);
    if (!/^[0-9a-f]{40}$/.test(commit)) throw new Error(`it names the commit ${JSON.stringify(commit)}`);
    const repo = { type: 'model', name } as const;
    const entries: ListFileEntry[] = [];
    const files = listFiles({ repo, revision: commit, ...access(REQUEST_TIMEOUT_ms, signal) });
    for await (const entry of files) entries.push(entry);
    return { commit, entries };
  } catch (error) {
    const status = (error as { statusCode?: number }).statusCode;
    const hint = status === 401 || status === 403 ? ' (is it private or gated? set HF_TOKEN)' : '';
    throw notGiven(name, error, signal, hint);
  }
}

type WantedFile = {
  readonly repository: string;
  readonly commit: string;
  readonly entry: ListFileEntry;
  readonly target: string;
  readonly onBytes: (done: number) => void;
  readonly signal: Signal;
};

async function fetchFile({ repository, commit, entry, target, onBytes, signal }: WantedFile): Promise<void> {
  const repo = { type: 'model', name: repository } as const;
  const hub = access(REQUEST_TIMEOUT_ms, signal);
  const info = await fileDownloadInfo({ repo, path: entry.path, revision: commit, ...hub }).catch(
    (error: unknown) => {
      throw notGiven(entry.path, error, signal);
    },
  );
  if (info === null)
    throw new MaskrouteError('download_failed', `${repository} has no ${entry.path} any more`);
  await download({
    url: info.url,
    ...(hub.accessToken && { headers: { authorization: `Bearer ${hub.accessToken}` } }),
    ...{ bytes: entry.size, sha256: entry.lfs?.oid, target, onBytes, signal },
  });
}

function notGiven(what: string, cause: unknown, signal: Signal, hint = ''): MaskrouteError {
  signal?.throwIfAborted();
  const message = `the hub does not give ${what}: ${messageOf(cause)}${hint}`;
  return new MaskrouteError('download_failed', message, { cause });
}

/* Which files of a hub repository make a model: the original weights before a quantized repackaging of them. */

type ChosenFiles = { readonly kind: 'folder' | 'gguf'; readonly files: readonly ListFileEntry[] };

const FOLDER_FILES = ['config.json', 'tokenizer.json'];
const OPTIONAL_FILES = [
  'tokenizer_config.json',
  'generation_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'model.safetensors.index.json',
];
/** Nearest to the original first; all of them are read. */
const GGUF_PREFERENCE = [
  'q8_0',
  'q6_k',
  'q5_k_m',
  'q5_k_s',
  'q4_k_m',
  'q4_k_s',
  'q4_1',
  'q4_0',
  'bf16',
  'f16',
  'f32',
];

/** @throws MaskrouteError `unsupported_model` with what is missing. */
function chooseFiles(
  repository: string,
  entries: readonly ListFileEntry[],
  file: string | undefined,
): ChosenFiles {
  // Only the top folder: a path from a server never becomes a path on this machine.
  const files = new Map(
    entries
      .filter((entry) => entry.type === 'file' && /^[A-Za-z0-9][\w.+-]*$/.test(entry.path))
      .map((entry) => [entry.path, entry]),
  );
  if (file !== undefined) {
    const entry = files.get(file);
    if (entry === undefined) throw unsupportedModel(`${repository} has no file ${file}`);
    return { kind: 'gguf', files: [entry] };
  }
  const weights = safetensors(files);
  if (weights.length > 0 && FOLDER_FILES.every((name) => files.has(name))) {
    const beside = [...FOLDER_FILES, ...OPTIONAL_FILES].flatMap((name) => files.get(name) ?? []);
    return { kind: 'folder', files: [...beside, ...weights] };
  }
  const gguf = bestGguf([...files.values()]);
  if (gguf !== undefined) return { kind: 'gguf', files: [gguf] };
  throw unsupportedModel(
    `${repository} has neither config.json, tokenizer.json and *.safetensors nor a *.gguf file`,
  );
}

function safetensors(files: ReadonlyMap<string, ListFileEntry>): ListFileEntry[] {
  const single = files.get('model.safetensors');
  if (single !== undefined) return [single];
  return [...files.values()].filter((entry) => /^model-\d{5}-of-\d{5}\.safetensors$/.test(entry.path));
}

function bestGguf(entries: readonly ListFileEntry[]): ListFileEntry | undefined {
  const candidates = entries.filter(({ path }) => /\.gguf$/i.test(path) && !/-of-\d{5}\.gguf$/i.test(path));
  for (const kind of GGUF_PREFERENCE) {
    const match = candidates.find(({ path }) => path.toLowerCase().endsWith(`${kind}.gguf`));
    if (match !== undefined) return match;
  }
  return candidates[0];
}
