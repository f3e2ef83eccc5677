/** Runs the build command of wrangler.toml, as `wrangler deploy` does before it bundles. */
import { execFile } from 'node:child_process';
import path from 'node:path';
import { promisify } from 'node:util';
import { MaskrouteError } from '../../shared/errors.ts';

const OUTPUT_CHARS_MAX = 2000;
const LIMIT_ms = 60_000;

/** The command finds this very Node first. @throws MaskrouteError `start_failed` with what the command said. */
export async function runBuild(command: string, projectFolder: string): Promise<void> {
  const PATH = [path.dirname(process.execPath), process.env.PATH].join(path.delimiter);
  try {
    await promisify(execFile)('sh', ['-c', command], {
      cwd: projectFolder,
      env: { ...process.env, PATH },
      timeout: LIMIT_ms,
    });
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string };
    const reason = (stderr || message).slice(-OUTPUT_CHARS_MAX);
    throw new MaskrouteError('start_failed', `"${command}" failed: ${reason}`, { cause: error });
  }
}
