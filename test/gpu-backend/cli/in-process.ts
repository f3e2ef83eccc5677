/** What the command line says to people, without a process of its own, which takes longer than any refusal. */
import { vi } from 'vitest';
import { main } from '../../../gpu-backend/cli/cli.ts';

/** One at a time. `env` is added to the environment of this process, and what a test stubs there is gone after it. */
export async function saidInProcess(env: Readonly<Record<string, string>>, args: readonly string[]) {
  for (const [name, value] of Object.entries(env)) vi.stubEnv(name, value);
  const said = { stdout: '', stderr: '' };
  const hear = (stream: 'stdout' | 'stderr') => (text: unknown) => {
    said[stream] += text;
    return true;
  };
  vi.spyOn(process.stdout, 'write').mockImplementation(hear('stdout'));
  vi.spyOn(process.stderr, 'write').mockImplementation(hear('stderr'));
  vi.spyOn(console, 'log').mockImplementation((text) => void hear('stdout')(`${text}\n`));
  vi.spyOn(console, 'error').mockImplementation((text) => void hear('stderr')(`${text}\n`));
  await main(args);
  const status = process.exitCode ?? 0;
  process.exitCode = undefined;
  vi.restoreAllMocks();
  vi.unstubAllEnvs();
  return { status, ...said };
}
