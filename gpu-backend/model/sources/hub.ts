/**
 * Downloads a model from the Hugging Face hub: safetensors and the files beside them, or a GGUF file. All files are from one
 * commit, and large files are checked against the hub's SHA-256. `HF_TOKEN` and `HF_ENDPOINT` have the same meaning as in
 * Hugging Face's tools.
 */
import { mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { HUB_URL, type ListFileEntry, listFiles, modelInfo } from '@huggingface/hub';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { sizeOf } from '../../files.ts';
import { ggufPart, ggufStem } from '../formats/gguf.ts';
import { configOfFolder, INDEX_FILE, isShard, SINGLE_FILE } from '../formats/hf-folder.ts';
import type { LocalModel } from '../import-model.ts';
import { type ImportHooks, unsupportedModel } from '../model-source.ts';
import { tokenizerFromFolder } from '../tokenizer/hf-tokenizer.ts';
import { aloneIn, download, messageOf } from './download.ts';
import { ggufModels, refusePickles } from './local.ts';

export type HubModel = {
  /** `OWNER/NAME`. */
  readonly repository: string;
  /** A branch, tag or commit; undefined: the default branch. */
  readonly revision: string | undefined;
  /** A GGUF file of the repository, or any part of a file in parts. */
  readonly file: string | undefined;
};

/** @throws MaskrouteError `download_failed`, `unsupported_model`. */
export async function fetchFromHub(model: HubModel, home: string, hooks: ImportHooks): Promise<LocalModel> {
  const { repository, file } = model;
  const { commit, entries } = await listRepository(repository, model.revision, hooks.signal);
  const { kind, beside, weights } = chooseFiles(repository, entries, file);
  if (kind === 'folder') {
    const text = await fetchAll({ repository, commit, files: beside }, home, hooks);
    // Refused before gigabytes come.
    await tokenizerFromFolder(text, (await configOfFolder(text)).vocabularySize);
  }
  const folder = await fetchAll({ repository, commit, files: weights }, home, hooks);
  const source = `hf:${repository}@${commit}`;
  if (kind === 'folder') return { kind, path: folder, source };
  const { path } = weights[0]!;
  return { kind, path: join(folder, path), source: `${source}/${path}` };
}

/**
 * Downloads the files of a sentence encoder, and returns their folder, whose name is the commit.
 * @throws MaskrouteError `download_failed`, `unsupported_model`.
 */
export async function fetchEncoderFromHub(
  repository: string,
  revision: string | undefined,
  home: string,
  hooks: ImportHooks,
): Promise<string> {
  const { commit, entries } = await listRepository(repository, revision, hooks.signal);
  const files = chooseEncoderFiles(repository, entries);
  return fetchAll({ repository, commit, files }, home, hooks);
}

type Chosen = {
  readonly repository: string;
  readonly commit: string;
  readonly files: readonly ListFileEntry[];
};

/** Downloads the files unless they are there, and returns their folder. */
async function fetchAll(chosen: Chosen, home: string, hooks: ImportHooks): Promise<string> {
  const { repository, commit, files } = chosen;
  const folder = join(home, 'sources', 'hub', repository.replace('/', '--'), commit);
  const sizes = await Promise.all(files.map(({ path }) => sizeOf(join(folder, path))));
  const isThere = files.every(({ size }, i) => sizes[i] === size);
  if (!isThere) await aloneIn(folder, hooks, () => fetchMissing(chosen, folder, hooks));
  return folder;
}

async function fetchMissing(
  { repository, commit, files }: Chosen,
  folder: string,
  hooks: ImportHooks,
): Promise<void> {
  const total = files.reduce((sum, entry) => sum + entry.size, 0);
  hooks.log(`Fetching ${files.length} files (${Math.ceil(total / 1e6)} MB) of ${repository} from the hub`);
  let before = 0;
  for (const entry of files) {
    const target = join(folder, entry.path);
    await mkdir(dirname(target), { recursive: true });
    const onBytes = (done: number) =>
      hooks.onProgress({ phase: 'download', done: before + done, total, unit: 'bytes' });
    if ((await sizeOf(target)) !== entry.size) {
      await fetchFile({ repository, commit, entry, target, onBytes, signal: hooks.signal });
    }
    before += entry.size;
    onBytes(0);
  }
}

/* Requests to the hub. */

/** For the first request, so that an unreachable hub fails soon; a poor line takes seconds for it. */
const PROBE_TIMEOUT_ms = 10_000;
const REQUEST_TIMEOUT_ms = 30_000;

type Signal = AbortSignal | undefined;

function access(timeout_ms: number, signal: Signal) {
  const hubUrl = process.env.HF_ENDPOINT?.replace(/\/+$/, '');
  const accessToken = process.env.HF_TOKEN || process.env.HUGGING_FACE_HUB_TOKEN;
  const bounded: typeof fetch = (input, init) =>
    fetch(input, {
      ...init,
      signal: AbortSignal.any([AbortSignal.timeout(timeout_ms), ...(signal ? [signal] : [])]),
    });
  return { fetch: bounded, ...(hubUrl && { hubUrl }), ...(accessToken && { accessToken }) };
}

const ACCESS_HINTS: Readonly<Record<number, string>> = {
  401: ' (is it private or gated? set HF_TOKEN)',
  403: ' (is it private or gated? set HF_TOKEN)',
};
const HINTS: Readonly<Record<number, string>> = {
  ...ACCESS_HINTS,
  404: ' (no such repository or revision)',
};

async function listRepository(
  name: string,
  revision: string | undefined,
  signal: Signal,
): Promise<{ commit: string; entries: ListFileEntry[] }> {
  try {
    const probe = access(PROBE_TIMEOUT_ms, signal);
    const commit = String(
      (await modelInfo({ name, additionalFields: ['sha'], ...(revision && { revision }), ...probe })).sha,
    );
    if (!/^[0-9a-f]{40}$/.test(commit)) throw new Error(`it names the commit ${JSON.stringify(commit)}`);
    const repo = { type: 'model', name } as const;
    const entries: ListFileEntry[] = [];
    const files = listFiles({
      repo,
      revision: commit,
      recursive: true,
      ...access(REQUEST_TIMEOUT_ms, signal),
    });
    for await (const entry of files) entries.push(entry);
    return { commit, entries };
  } catch (error) {
    signal?.throwIfAborted();
    const status = (error as { statusCode?: number }).statusCode;
    const message = `the hub does not give ${name}: ${messageOf(error)}${HINTS[status ?? 0] ?? ''}`;
    throw new MaskrouteError('download_failed', message, { cause: error });
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
  const { hubUrl = HUB_URL, accessToken } = access(REQUEST_TIMEOUT_ms, signal);
  await download({
    // The hub redirects to a signed link that expires within the hour, so each attempt begins at the hub. `fetch` sends
    // the token to the hub only.
    url: `${hubUrl}/${repository}/resolve/${commit}/${entry.path}`,
    ...(accessToken && { headers: { authorization: `Bearer ${accessToken}` } }),
    bytes: entry.size,
    sha256: entry.lfs?.oid,
    target,
    onBytes,
    hints: ACCESS_HINTS,
    signal,
  });
}

/* Chooses the files of a repository that make a model; original weights before quantized GGUF files. */

type ChosenFiles = {
  readonly kind: 'folder' | 'gguf';
  /** The small files that a folder needs. */
  readonly beside: readonly ListFileEntry[];
  readonly weights: readonly ListFileEntry[];
};

const FOLDER_FILES = ['config.json', 'tokenizer.json'];
const OPTIONAL_FILES = [
  'tokenizer_config.json',
  'generation_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  INDEX_FILE,
];
/** Preferred types first: quantized types by precision, then larger float types; all are supported. */
const GGUF_PREFERENCE = [
  'q8_0',
  'q6_k',
  'q5_k_m',
  'q5_k_s',
  'q4_k_m',
  'q4_k_s',
  'q4_1',
  'iq4_nl',
  'iq4_xs',
  'q4_0',
  'bf16',
  'f16',
  'f32',
  'q3_k_l',
  'q3_k_m',
  'q3_k_s',
  'q2_k',
];

/** Paths come from a server and become paths on this machine, so only a plain file name, or a file in one folder, is allowed. */
const SAFE_PATH = /^(?:[A-Za-z0-9][\w.+-]*\/)?[A-Za-z0-9][\w.+-]*$/;

const filesByPath = (entries: readonly ListFileEntry[]): Map<string, ListFileEntry> =>
  new Map(
    entries
      .filter((entry) => entry.type === 'file' && SAFE_PATH.test(entry.path))
      .map((entry) => [entry.path, entry]),
  );

/** @throws MaskrouteError `unsupported_model` with what is missing. */
function chooseFiles(
  repository: string,
  entries: readonly ListFileEntry[],
  file: string | undefined,
): ChosenFiles {
  const files = filesByPath(entries);
  if (file !== undefined) {
    if (!files.has(file)) throw unsupportedModel(`${repository} has no file ${file}`);
    return { kind: 'gguf', beside: [], weights: partsOf(file, files) };
  }
  const weights = safetensors(files);
  if (weights.length > 0 && FOLDER_FILES.every((name) => files.has(name))) {
    const beside = [...FOLDER_FILES, ...OPTIONAL_FILES].flatMap((name) => files.get(name) ?? []);
    return { kind: 'folder', beside, weights };
  }
  const top = [...files.keys()].filter((path) => !path.includes('/'));
  const gguf = bestGguf(ggufModels(top));
  if (gguf !== undefined) return { kind: 'gguf', beside: [], weights: partsOf(gguf, files) };
  if (weights.length === 0) refusePickles(top);
  throw unsupportedModel(
    `${repository} has neither config.json, tokenizer.json and ${SINGLE_FILE} (or shards and ${INDEX_FILE}) nor a *.gguf file`,
  );
}

function safetensors(files: ReadonlyMap<string, ListFileEntry>): ListFileEntry[] {
  const single = files.get(SINGLE_FILE);
  if (single !== undefined) return [single];
  return files.has(INDEX_FILE) ? [...files.values()].filter((entry) => isShard(entry.path)) : [];
}

function bestGguf(candidates: readonly string[]): string | undefined {
  for (const kind of GGUF_PREFERENCE) {
    const match = candidates.find((path) => ggufStem(path).toLowerCase().endsWith(kind));
    if (match !== undefined) return match;
  }
  return candidates[0];
}

/** The file, or all parts of a file in parts, in order. */
function partsOf(file: string, files: ReadonlyMap<string, ListFileEntry>): ListFileEntry[] {
  const named = ggufPart(file);
  if (named === undefined) return [files.get(file)!];
  return Array.from({ length: named.count }, (_, i) => {
    const path = named.nameOf(i + 1);
    const part = files.get(path);
    if (part === undefined) throw unsupportedModel(`the repository has no ${path}, a part of ${file}`);
    return part;
  });
}

/** Files that sentence-transformers writes beside the weights of an encoder. */
const ENCODER_OPTIONAL_FILES = [
  'modules.json',
  'sentence_bert_config.json',
  'config_sentence_transformers.json',
  '1_Pooling/config.json',
];

/** @throws MaskrouteError `unsupported_model` with what is missing. */
function chooseEncoderFiles(repository: string, entries: readonly ListFileEntry[]): ListFileEntry[] {
  const files = filesByPath(entries);
  const weights = files.get(SINGLE_FILE) ?? files.get('onnx/model.onnx') ?? files.get('model.onnx');
  if (weights !== undefined && FOLDER_FILES.every((name) => files.has(name))) {
    const beside = [...FOLDER_FILES, ...ENCODER_OPTIONAL_FILES].flatMap((name) => files.get(name) ?? []);
    return [...beside, weights];
  }
  if (weights === undefined) refusePickles([...files.keys()]);
  throw unsupportedModel(
    `${repository} lacks config.json, tokenizer.json, or weights (model.safetensors or onnx/model.onnx)`,
  );
}
