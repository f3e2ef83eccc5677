/** `maskroute serve` as a process of its own, on a free port. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';

const CLI = new URL('../../gpu-backend/cli/cli.ts', import.meta.url).pathname;

export type Served = {
  readonly child: ChildProcess;
  /** Its address, once it answers. Rejects with its output when it ends before. */
  readonly url: Promise<string>;
  /** What it has written so far. */
  readonly output: () => string;
  /** Its exit status; null after a signal. */
  readonly exit: Promise<number | null>;
  /** Ends it without a chance to finish anything. */
  kill(): Promise<void>;
};

/** `env` is added to the environment of this process. The caller ends the process. */
export function serve(model: string, env: Record<string, string> = {}): Served {
  const child = spawn(process.execPath, [CLI, 'serve', '--model', model], {
    env: { ...process.env, BACKEND_PORT: '0', ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const { promise: url, resolve, reject } = Promise.withResolvers<string>();
  // Not every test waits for the address.
  url.catch(() => {});
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text;
      const said = /"url":"([^"]+)"/.exec(output)?.[1];
      if (said !== undefined) resolve(said);
    });
  }
  const exit = once(child, 'exit').then(([status]) => status as number | null);
  void exit.then(() => reject(new Error(`${model} is not served: ${output}`)));
  const kill = async () => {
    child.kill('SIGKILL');
    await exit;
  };
  return { child, url, output: () => output, exit, kill };
}
