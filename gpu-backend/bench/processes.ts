/**
 * What running processes cost, as Linux counts it: CPU time, which on a busy machine says more of the work done than a clock
 * does, and memory.
 */
import { readdirSync, readFileSync } from 'node:fs';

/** Linux counts in hundredths of a second. */
const TICK_ms = 10;
/** Fields of /proc/PID/stat, counted from the one after the name. */
const [PARENT, USER, SYSTEM] = [1, 11, 12] as const;

/** Of all of them together, in ms; null where there is no /proc. */
export function cpuTime_ms(pids: readonly number[]): number | null {
  let ticks = 0;
  for (const pid of pids) {
    const fields = statOf(pid);
    if (fields === null) return null;
    ticks += Number(fields[USER]) + Number(fields[SYSTEM]);
  }
  return ticks * TICK_ms;
}

/** The process and all that descend from it. */
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

/** What one process of `npm start` holds; `name` says what it is to the product. */
type ProcessMemory = { readonly pid: number; readonly name: string; readonly rss_MB: number };

const PARTS: readonly (readonly [name: string, pattern: RegExp])[] = [
  ['workerd', /workerd/],
  ['backend', /\.ts backend/],
  ['edge', /\.ts edge/],
  ['start', /dev\/start\.ts/],
];

/** Of `root` and of all below it; 0 MB for one that has ended meanwhile. */
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
