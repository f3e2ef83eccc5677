/**
 * A model from the Hugging Face hub: the safetensors files and what belongs to them, or a GGUF file. Everything is
 * taken at one commit, and large files are checked against the SHA-256 that the hub publishes.
 * `HF_TOKEN` and `HF_ENDPOINT` are honoured, as in Hugging Face's own tools.
 */

import { mkdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { fileDownloadInfo, type ListFileEntry, listFiles, modelInfo } from '@huggingface/hub';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { LocalModel } from '../import-model.ts';
import { type ImportHooks, unsupportedModel } from '../model-source.ts';
import { download, messageOf } from './download.ts';

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

/** Whether the hub can be reached at all is known quickly, one way or the other. */
const PROBE_TIMEOUT_ms = 3000;
const REQUEST_TIMEOUT_ms = 30_000;

/** `file`: one GGUF file of the repository. @throws MaskrouteError `download_failed`, `unsupported_model`. */
export async function fetchFromHub(
  repository: string,
  file: string | undefined,
  home: string,
  hooks: ImportHooks,
): Promise<LocalModel> {
  const hub = connect(repository, hooks);
  const { commit, entries } = await hub.list();
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
    if ((await sizeOf(target)) !== entry.size) await hub.fetchFile(entry, commit, target, onBytes);
    before += entry.size;
    onBytes(0);
  }
  const source = `hf:${repository}@${commit}`;
  return chosen.kind === 'folder'
    ? { kind: 'folder', path: folder, source }
    : {
        kind: 'gguf',
        path: join(folder, chosen.files[0]!.path),
        source: `${source}/${chosen.files[0]!.path}`,
      };
}

function connect(repository: string, { signal }: ImportHooks) {
  const hubUrl = process.env.HF_ENDPOINT?.replace(/\/+$/, '') || undefined;
  const accessToken = process.env.HF_TOKEN || undefined;
  const common = { ...(hubUrl && { hubUrl }), ...(accessToken && { accessToken }) };
  const boundedFetch =
    (timeout_ms: number): typeof fetch =>
    (input, init) =>
      fetch(input, {
        ...init,
        signal: AbortSignal.any([AbortSignal.timeout(timeout_ms), ...(signal ? [signal] : [])]),
      });

  async function list(): Promise<{ commit: string; entries: ListFileEntry[] }> {
    try {
      const info = await modelInfo({
        name: repository,
        additionalFields: ['sha'],
        fetch: boundedFetch(PROBE_TIMEOUT_ms),
        ...common,
      });
      const commit = String(info.sha);
      if (!/^[0-9a-f]{40}$/.test(commit)) throw new Error(`it names the commit ${JSON.stringify(commit)}`);
      const entries: ListFileEntry[] = [];
      const repo = { type: 'model', name: repository } as const;
      for await (const entry of listFiles({
        repo,
        revision: commit,
        fetch: boundedFetch(REQUEST_TIMEOUT_ms),
        ...common,
      })) {
        entries.push(entry);
      }
      return { commit, entries };
    } catch (error) {
      signal?.throwIfAborted();
      const status = (error as { statusCode?: number }).statusCode;
      const hint = status === 401 || status === 403 ? ' (is it private or gated? set HF_TOKEN)' : '';
      throw new MaskrouteError(
        'download_failed',
        `the hub does not give ${repository}: ${messageOf(error)}${hint}`,
        { cause: error },
      );
    }
  }

  async function fetchFile(
    entry: ListFileEntry,
    commit: string,
    target: string,
    onBytes: (done: number) => void,
  ): Promise<void> {
    const repo = { type: 'model', name: repository } as const;
    const info = await fileDownloadInfo({
      repo,
      path: entry.path,
      revision: commit,
      fetch: boundedFetch(REQUEST_TIMEOUT_ms),
      ...common,
    }).catch((error: unknown) => {
      signal?.throwIfAborted();
      throw new MaskrouteError(
        'download_failed',
        `the hub does not give ${entry.path}: ${messageOf(error)}`,
        {
          cause: error,
        },
      );
    });
    if (info === null)
      throw new MaskrouteError('download_failed', `${repository} has no ${entry.path} any more`);
    await download({
      url: info.url,
      ...(accessToken && { headers: { authorization: `Bearer ${accessToken}` } }),
      bytes: entry.size,
      sha256: entry.lfs?.oid,
      target,
      onBytes,
      signal,
    });
  }

  return { list, fetchFile };
}

const sizeOf = (path: string): Promise<number | undefined> =>
  stat(path).then(
    (found) => found.size,
    () => undefined,
  );
