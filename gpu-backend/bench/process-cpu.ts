/** The CPU time of processes, as Linux counts it: on a busy machine it says more of the work done than a clock does. */
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

/** Null for a process that is gone, or without /proc. */
function statOf(pid: number): string[] | null {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return text.slice(text.lastIndexOf(')') + 2).split(' ');
  } catch {
    return null;
  }
}
