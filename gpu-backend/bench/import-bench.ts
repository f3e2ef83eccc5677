/**
 * `bench import`: time, throughput and peak memory of importing a model in a child process, beside what the disk and the
 * CPU allow.
 *
 * The limit: the disk reads the source once and writes the result once; all cores share the import's CPU time evenly. An
 * import that overlaps the two perfectly takes as long as the slower of them.
 */
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { closeSync, fsyncSync, openSync, readSync, rmSync, statSync, writeSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { type BenchHooks, round } from '../measure.ts';
import { describeLocal } from '../model/import-model.ts';
import type { WeightKind } from '../model/model-source.ts';
import { fetchModel, parseModelSpec } from '../model/sources/resolve.ts';
import { openInstalled } from '../model/store.ts';
import { cpuTime_ms, memoryOf } from '../processes.ts';

const COMMAND = fileURLToPath(new URL('../../bin/maskroute.js', import.meta.url));
const LOOK_EVERY_ms = 100;
const DISK_SAMPLE_BYTES = 2 ** 30;

type ImportBenchOptions = BenchHooks & {
  /** A file or folder. */
  readonly spec: string;
  readonly weights: WeightKind;
  /** Where the model is installed and kept; undefined: in a temporary folder. */
  readonly home: string | undefined;
};

export async function benchImport({ spec, weights, home, say, signal }: ImportBenchOptions): Promise<object> {
  const folder = home ?? (await mkdtemp(join(tmpdir(), 'maskroute-bench-import-')));
  try {
    const hooks = { onProgress: () => {}, log: say, signal };
    const local = await fetchModel(await parseModelSpec(spec), folder, hooks);
    const source = await describeLocal(local);
    const source_bytes = source.files.reduce((sum, file) => sum + statSync(file).size, 0);
    const disk = measureDisk(folder, source.files);
    say(`the disk writes ${disk.write_GBps.toFixed(2)} GB/s and reads ${disk.read_GBps.toFixed(2)} GB/s`);
    const run = await pullInChild(folder, spec, weights, signal);
    const { manifest } = await openInstalled(folder, run.name);
    const written_bytes = Object.values(manifest.files).reduce((sum, { bytes }) => sum + bytes, 0);
    const cores = availableParallelism();
    const diskAlone_s = written_bytes / disk.write_GBps / 1e9 + source_bytes / disk.read_GBps / 1e9;
    const cpuAlone_s = run.cpu_s / cores;
    const limit_s = Math.max(diskAlone_s, cpuAlone_s);
    const above_bytes = run.peak_bytes - source.largestTensor_bytes;
    say(
      `${run.seconds.toFixed(1)} s; the disk alone takes ${diskAlone_s.toFixed(1)}, the CPU alone ${cpuAlone_s.toFixed(1)}`,
    );
    say(
      `at most ${gigabytes(run.peak_bytes)} GB in memory; the largest tensor is ${gigabytes(source.largestTensor_bytes)} GB`,
    );
    return {
      bench: 'import',
      model: run.name,
      weights,
      cores,
      source_GB: gigabytes(source_bytes),
      written_GB: gigabytes(written_bytes),
      seconds: round(run.seconds, 1),
      cpu_s: round(run.cpu_s, 1),
      read_GBps: round(source_bytes / run.seconds / 1e9),
      diskAlone_s: round(diskAlone_s, 1),
      cpuAlone_s: round(cpuAlone_s, 1),
      shareOfLimit: round(limit_s / run.seconds),
      peak_GB: gigabytes(run.peak_bytes),
      largestTensor_GB: gigabytes(source.largestTensor_bytes),
      aboveLargestTensor_GiB: round(above_bytes / 2 ** 30),
    };
  } finally {
    if (home === undefined) await rm(folder, { recursive: true, force: true });
  }
}

const gigabytes = (bytes: number): number => round(bytes / 1e9);

type Run = {
  readonly name: string;
  readonly seconds: number;
  readonly cpu_s: number;
  readonly peak_bytes: number;
};

/** `model pull` in a child process. The kernel records a process's peak memory, which is read while the child runs. */
async function pullInChild(
  home: string,
  spec: string,
  weights: WeightKind,
  signal?: AbortSignal,
): Promise<Run> {
  signal?.throwIfAborted();
  const args = ['model', 'pull', spec, '--weights', weights, '--force', '--json'];
  const begun_ms = performance.now();
  const child = spawn(process.execPath, [COMMAND, ...args], {
    env: { ...process.env, MASKROUTE_HOME: home },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const stop = () => void child.kill('SIGTERM');
  signal?.addEventListener('abort', stop, { once: true });
  let [peak_bytes, cpu_ms] = [0, 0];
  const look = setInterval(() => {
    peak_bytes = Math.max(peak_bytes, memoryOf(child.pid!).peak_bytes);
    cpu_ms = cpuTime_ms([child.pid!]) ?? cpu_ms;
  }, LOOK_EVERY_ms);
  const [out, [status]] = await Promise.all([text(child.stdout), once(child, 'exit')]);
  clearInterval(look);
  if (status !== 0) throw new Error(`the import ended with ${status}`);
  const seconds = (performance.now() - begun_ms) / 1000;
  const { name } = JSON.parse(out) as { name: string };
  return { name, seconds, cpu_s: cpu_ms / 1000, peak_bytes };
}

/** Times writing a gigabyte with fsync, and reading up to a gigabyte of the source (from the page cache if it is there). */
function measureDisk(folder: string, files: readonly string[]): { write_GBps: number; read_GBps: number } {
  const buffer = randomBytes(8 * 1024 * 1024);
  const path = join(folder, '.disk-sample');
  const target = openSync(path, 'w');
  const writeBegun_ms = performance.now();
  let write_ms = 0;
  try {
    for (let done = 0; done < DISK_SAMPLE_BYTES; done += buffer.length) writeSync(target, buffer);
    fsyncSync(target);
    write_ms = performance.now() - writeBegun_ms;
  } finally {
    closeSync(target);
    // Also when the disk was too full for the sample.
    rmSync(path);
  }
  const readBegun_ms = performance.now();
  let read_bytes = 0;
  for (const file of files) {
    const descriptor = openSync(file, 'r');
    for (let got = 1; got > 0 && read_bytes < DISK_SAMPLE_BYTES; read_bytes += got)
      got = readSync(descriptor, buffer, 0, buffer.length, null);
    closeSync(descriptor);
  }
  const read_ms = performance.now() - readBegun_ms;
  return { write_GBps: DISK_SAMPLE_BYTES / write_ms / 1e6, read_GBps: read_bytes / read_ms / 1e6 };
}
