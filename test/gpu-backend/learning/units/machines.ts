/** A queue on loopback, and workers in processes of their own, each as on a machine of its own. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Redis } from 'ioredis';
import { eventually } from '../../api/harness.ts';

export const cli = fileURLToPath(new URL('../../../../gpu-backend/cli/cli.ts', import.meta.url));

type Machine = {
  readonly child: ChildProcess;
  /** Names of the units that it computed, in order. */
  readonly computed: string[];
  /** All that it said to people. */
  said(): string;
  /** Its exit code, or the signal that ended it. */
  readonly ended: Promise<number | string>;
};

/** One command in a process of its own. */
export function startCommand(home: string, args: readonly string[]): Machine {
  const child = spawn(process.execPath, [cli, ...args], {
    env: { ...process.env, MASKROUTE_HOME: home },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const computed: string[] = [];
  let said = '';
  createInterface({ input: child.stdout }).on('line', (line) => {
    if (line.startsWith('{"unit"')) computed.push(JSON.parse(line).unit);
  });
  child.stderr.on('data', (text) => {
    said += text;
  });
  const ended = once(child, 'close').then(([code, signal]) => (code ?? signal) as number | string);
  return { child, computed, said: () => said, ended };
}

export class Machines implements AsyncDisposable {
  readonly all: Machine[] = [];
  readonly redis: Redis;
  readonly #flags: readonly string[];
  readonly #home: string;

  constructor(url: string, journal: string, home: string) {
    this.#flags = ['--queue', url, '--journal', journal, '--threads', '1', '--lease', '2', '--json'];
    this.#home = home;
    this.redis = new Redis(url, { maxRetriesPerRequest: null, retryStrategy: () => 200 });
    this.redis.on('error', () => {});
  }

  /** Later flags count. */
  start(...flags: string[]): Machine {
    const machine = startCommand(this.#home, ['work', ...this.#flags, ...flags]);
    this.all.push(machine);
    return machine;
  }

  /** That computed units, in order of start. */
  computed(): string[] {
    return this.all.flatMap(({ computed }) => computed);
  }

  /** Those that computed something more than once. */
  twice(): string[] {
    const computed = this.computed();
    return computed.filter((unit, index) => computed.indexOf(unit) !== index);
  }

  /** Names of the units that are being computed, and by which process. */
  async claims(): Promise<{ unit: string; pid: number }[]> {
    const keys = await this.redis.keys('maskroute:claim:*');
    const owners = await Promise.all(keys.map((key) => this.redis.get(key)));
    return keys.flatMap((key, index) => {
      const pid = Number(owners[index]?.split(' ').at(-1));
      return Number.isInteger(pid) ? [{ unit: key.slice('maskroute:claim:'.length), pid }] : [];
    });
  }

  async isComputing({ child }: Machine): Promise<boolean> {
    return (await this.claims()).some(({ pid }) => pid === child.pid);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const { child } of this.all) child.kill('SIGKILL');
    await Promise.all(this.all.map(({ ended }) => ended));
    this.redis.disconnect();
  }
}

/** Until it is so; long enough for a machine that has much else to do. */
export const soon = (isSo: () => boolean | Promise<boolean>) => eventually(isSo, 60_000);
