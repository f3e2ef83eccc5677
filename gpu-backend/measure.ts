/**
 * Shared by all benchmarks: interleaved rounds, so that a temporary slowdown of the machine affects all subjects alike, and
 * statistics of the times; also the machine's processes and ports.
 */
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { type AddressInfo, createServer } from 'node:net';

/** `say` gets progress lines. When `signal` aborts, a bench stops before its next turn and ends what it started. */
export type BenchHooks = {
  readonly say: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};

/**
 * Measures every subject once in each of `rounds` rounds, in reversed order every second round.
 * @returns the results of each subject, by its name.
 * Rejects before the next turn once `signal` aborts.
 */
export async function inTurns<S extends { readonly name: string }, T>(
  subjects: readonly S[],
  rounds: number,
  measure: (subject: S) => Promise<T>,
  signal?: AbortSignal,
): Promise<Map<string, T[]>> {
  const found = new Map<string, T[]>(subjects.map(({ name }) => [name, []]));
  for (let turn = 0; turn < rounds; turn++) {
    for (const subject of turn % 2 === 0 ? subjects : subjects.toReversed()) {
      signal?.throwIfAborted();
      found.get(subject.name)!.push(await measure(subject));
    }
  }
  return found;
}

/** A thing to measure: one figure for each call. */
export type Subject = { readonly name: string; measure(): Promise<number> };

/** The median of every subject over `rounds` turns, after a first turn that does not count. */
export async function interleaved(
  subjects: readonly Subject[],
  rounds: number,
  signal?: AbortSignal,
): Promise<Map<string, number>> {
  const found = await interleavedRounds(subjects, rounds, signal);
  return new Map([...found].map(([name, values]) => [name, median(values)]));
}

/** As {@link interleaved}, but with the figure of every turn. */
export async function interleavedRounds(
  subjects: readonly Subject[],
  rounds: number,
  signal?: AbortSignal,
): Promise<Map<string, number[]>> {
  const take = ({ measure }: Subject) => measure();
  await inTurns(subjects, 1, take, signal);
  return await inTurns(subjects, rounds, take, signal);
}

/** How long `work` takes. */
export async function time_ms(work: () => Promise<unknown>): Promise<number> {
  const begun_ms = performance.now();
  await work();
  return performance.now() - begun_ms;
}

/** How long each of so many turns of `work` takes, one after the other. */
export async function times_ms(turns: number, work: (turn: number) => Promise<unknown>): Promise<number[]> {
  const times: number[] = [];
  while (times.length < turns) times.push(await time_ms(() => work(times.length)));
  return times;
}

export function sumOf(values: Iterable<number>): number {
  let sum = 0;
  for (const value of values) sum += value;
  return sum;
}

export const average = (values: ArrayLike<number> & Iterable<number>): number =>
  sumOf(values) / values.length;

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The `share` quantile, 0 ≤ share < 1. */
export const quantile = (values: readonly number[], share: number): number =>
  values.toSorted((a, b) => a - b)[Math.floor(share * values.length)]!;

/** Items, such as blocks or units, by rising score. Where two have the same score, the lower one comes first. */
export const lowestFirst = (items: Iterable<number>, scoreOf: (item: number) => number): number[] =>
  [...items].sort((a, b) => scoreOf(a) - scoreOf(b) || a - b);

/** The same by falling score. */
export const highestFirst = (items: Iterable<number>, scoreOf: (item: number) => number): number[] =>
  lowestFirst(items, (item) => -scoreOf(item));

export const round = (value: number, digits = 3): number => Number(value.toFixed(digits));

/*
 * CPU time and memory of running processes, from Linux's /proc. On a busy machine CPU time measures the work better than
 * elapsed time.
 */

/** Linux's clock tick. */
const TICK_ms = 10;
/** Fields of /proc/PID/stat, counted from the one after the name. */
const [PARENT, USER, SYSTEM] = [1, 11, 12] as const;

/** CPU time of all `pids` together; null without /proc or when one has ended. */
export function cpuTime_ms(pids: readonly number[]): number | null {
  let ticks = 0;
  for (const pid of pids) {
    const fields = statOf(pid);
    if (fields === null) return null;
    ticks += Number(fields[USER]) + Number(fields[SYSTEM]);
  }
  return ticks * TICK_ms;
}

/** A port that was free a moment ago, for servers that cannot pick one themselves. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Ends a child by a signal, unless it has ended. */
export async function endChild(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const ended = once(child, 'exit');
  child.kill(signal);
  await ended;
}

/** The process and all its descendants. */
export function processTree(pid: number): number[] {
  const parents = new Map<number, number>();
  for (const name of listProcesses()) {
    const fields = statOf(Number(name));
    if (fields !== null) parents.set(Number(name), Number(fields[PARENT]));
  }
  const found = [pid];
  for (const one of found) for (const [child, parent] of parents) if (parent === one) found.push(child);
  return found;
}

function listProcesses(): string[] {
  try {
    return readdirSync('/proc').filter((name) => /^\d+$/.test(name));
  } catch {
    return [];
  }
}

/** Resident memory of one process of `npm start`; `name`: its part of the product. */
type ProcessMemory = { readonly pid: number; readonly name: string; readonly rss_MB: number };

const PARTS: readonly (readonly [name: string, pattern: RegExp])[] = [
  ['workerd', /workerd/],
  ['backend', /\.ts backend/],
  ['edge', /\.ts edge/],
  ['start', /dev\/start\.ts/],
];

/** Memory of `root` and its descendants; a process that ends meanwhile counts 0 MB. */
export const memoryBelow = (root: number): ProcessMemory[] =>
  processTree(root).map((pid) => {
    const command = procFile(pid, 'cmdline').replaceAll('\0', ' ');
    const name = PARTS.find(([, pattern]) => pattern.test(command))?.[0] ?? 'other';
    const kB = Number(/^VmRSS:\s+(\d+) kB$/m.exec(procFile(pid, 'status'))?.[1] ?? 0);
    return { pid, name, rss_MB: kB / 1024 };
  });

/** Null for a process that is gone, or without /proc. */
function statOf(pid: number): string[] | null {
  const text = procFile(pid, 'stat');
  return text === '' ? null : text.slice(text.lastIndexOf(')') + 2).split(' ');
}

/** Empty for a process that is gone, or without /proc. */
function procFile(pid: number, name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, 'utf8');
  } catch {
    return '';
  }
}
