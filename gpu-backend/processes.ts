/**
 * Running processes: CPU time and memory from Linux's /proc, children that must end. On a busy machine CPU time measures the
 * work better than elapsed time. Without /proc no process is found.
 */
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';

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
    return { pid, name, rss_MB: memoryOf(pid).now_bytes / 1e6 };
  });

/**
 * Memory of one process: `own_bytes` without, the others with pages of mapped files, which the kernel can reclaim. Zeros for
 * a process that is gone.
 */
export function memoryOf(pid: number): { own_bytes: number; now_bytes: number; peak_bytes: number } {
  const status = procFile(pid, 'status');
  const field = (name: string) =>
    1024 * Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(status)?.[1] ?? 0);
  return { own_bytes: field('RssAnon'), now_bytes: field('VmRSS'), peak_bytes: field('VmHWM') };
}

/** Null for a process that is gone. */
function statOf(pid: number): string[] | null {
  const text = procFile(pid, 'stat');
  return text === '' ? null : text.slice(text.lastIndexOf(')') + 2).split(' ');
}

/** Empty for a process that is gone. */
function procFile(pid: number, name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, 'utf8');
  } catch {
    return '';
  }
}
