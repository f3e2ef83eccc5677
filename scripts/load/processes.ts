/** How much memory this process's parts hold: it and all that it has started, by what they are to the product. */
import { readdirSync, readFileSync } from 'node:fs';

export type ProcessMemory = { readonly pid: number; readonly name: string; readonly rss_MB: number };

const PARTS: readonly (readonly [name: string, pattern: RegExp])[] = [
  ['workerd', /workerd/],
  ['backend', /\.ts backend/],
  ['edge', /\.ts edge/],
  ['start', /dev\/start\.ts/],
];

/** Of `root` and of all below it. */
export function memoryBelow(root: number): ProcessMemory[] {
  const parents = new Map<number, number>();
  for (const entry of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    const parent = /^PPid:\s+(\d+)$/m.exec(procFile(entry, 'status'))?.[1];
    if (parent !== undefined) parents.set(Number(entry), Number(parent));
  }
  const isOurs = (pid: number): boolean =>
    pid === root || (parents.has(pid) && parents.get(pid) !== pid && isOurs(parents.get(pid)!));
  return [...parents.keys()].filter(isOurs).map((pid) => {
    const command = procFile(pid, 'cmdline').replaceAll('\0', ' ');
    const name = PARTS.find(([, pattern]) => pattern.test(command))?.[0] ?? 'other';
    const kB = Number(/^VmRSS:\s+(\d+) kB$/m.exec(procFile(pid, 'status'))?.[1] ?? 0);
    return { pid, name, rss_MB: kB / 1024 };
  });
}

/** Empty of a process that has ended meanwhile. */
function procFile(pid: number | string, name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, 'utf8');
  } catch {
    return '';
  }
}
