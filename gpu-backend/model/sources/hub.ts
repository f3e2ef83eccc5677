/**
 * A model from the Hugging Face hub: the safetensors files and what belongs to them, or a GGUF file. Everything is
 * taken at one commit, and large files are checked against the SHA-256 that the hub publishes.
 * `HF_TOKEN` and `HF_ENDPOINT` are honoured, as in Hugging Face's own tools.
 */
import { mkdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { ListFileEntry } from '@huggingface/hub';
import { fileDownloadInfo, listFiles, modelInfo } from '@huggingface/hub';
import { MaskrouteError } from '../../../shared/errors.ts';
import type { LocalModel } from '../import-model.ts';
import type { ImportHooks } from '../progress.ts';
import { download, messageOf } from './download.ts';
import { chooseFiles } from './hub-files.ts';

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
