/** The edge's code as `wrangler deploy` would send it: its assets built, its worker bundled into one module. */
import { execFile } from 'node:child_process';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { build } from 'esbuild';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { EdgeConfig } from './edge-config.ts';

/**
 * Miniflare puts three workers of its own before the default entrypoint (pages about errors, assets that come before the
 * worker), which no request here needs, and which cost as much as all that ours does: a socket of an entrypoint with a
 * name leads past them.
 */
export const DOOR = 'door';

/** @throws MaskrouteError `start_failed` with what the build command said. */
export async function bundleEdge(
  config: EdgeConfig,
  { projectFolder, around }: { readonly projectFolder: string; readonly around?: string },
): Promise<string> {
  await runBuild(config.buildCommand, projectFolder);
  const { outputFiles } = await build({
    stdin: { contents: mainModule(config, around), resolveDir: projectFolder },
    bundle: true,
    write: false,
    format: 'esm',
    target: 'es2024',
    platform: 'neutral',
    mainFields: ['module', 'main'],
    conditions: ['workerd', 'worker', 'browser'],
    external: ['cloudflare:*', 'node:*'],
    logLevel: 'silent',
  });
  return outputFiles[0]!.text;
}

const DRAINABLE = fileURLToPath(new URL('./drainable.ts', import.meta.url));

/** The worker, made drainable, under both names by which Miniflare calls it. */
const mainModule = ({ entry, worker }: EdgeConfig, around: string | undefined): string => `
export * from ${JSON.stringify(entry)};
import worker from ${JSON.stringify(entry)};
${around === undefined ? 'const around = (worker) => worker;' : `import around from ${JSON.stringify(around)};`}
import { drainable } from ${JSON.stringify(DRAINABLE)};
const local = drainable(around(worker), ${JSON.stringify(Object.keys(worker.queueProducers))});
export { local as default, local as ${DOOR} };
`;

const OUTPUT_CHARS_MAX = 2000;
const BUILD_LIMIT_ms = 60_000;

/** The build command of wrangler.toml. It finds this very Node first. */
async function runBuild(command: string, projectFolder: string): Promise<void> {
  const PATH = [path.dirname(process.execPath), process.env.PATH].join(path.delimiter);
  try {
    await promisify(execFile)('sh', ['-c', command], {
      cwd: projectFolder,
      env: { ...process.env, PATH },
      timeout: BUILD_LIMIT_ms,
    });
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string };
    const reason = (stderr || message).slice(-OUTPUT_CHARS_MAX);
    throw new MaskrouteError('start_failed', `"${command}" failed: ${reason}`, { cause: error });
  }
}
