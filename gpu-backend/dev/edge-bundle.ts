/**
 * The edge's code as `wrangler deploy` would send it: its assets built, its worker bundled into one module. A bundle is kept
 * until a file that it is made of changes.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readOwnJson, writeWhole } from '../files.ts';
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
  const main = mainModule(config, around);
  const keptFile = path.join(projectFolder, 'node_modules/.cache/edge', `${sha256([main])}.json`);
  // What cannot be read or kept is made anew at each start.
  const kept = await readOwnJson(keptFile, keptSchema).catch(() => undefined);
  if (kept !== undefined && (await hashOf(kept.inputs).catch(() => '')) === kept.inputsHash)
    return kept.script;
  const begun_ms = Date.now();
  const { script, inputs } = await bundle(main, projectFolder);
  const made: Kept = { inputs, inputsHash: await hashOf(inputs), script };
  // A file that changed meanwhile may not be the one that was bundled.
  if ((await newestChange_ms(inputs)) < begun_ms)
    await mkdir(path.dirname(keptFile), { recursive: true })
      .then(() => writeWhole(keptFile, JSON.stringify(made)))
      .catch(() => undefined);
  return script;
}

const keptSchema = z.object({ inputs: z.array(z.string()), inputsHash: z.string(), script: z.string() });
type Kept = z.output<typeof keptSchema>;

async function bundle(main: string, projectFolder: string): Promise<Pick<Kept, 'script' | 'inputs'>> {
  // Loaded here: most often there is nothing to bundle.
  const { build } = await import('esbuild');
  const { outputFiles, metafile } = await build({
    absWorkingDir: projectFolder,
    stdin: { contents: main, resolveDir: projectFolder, sourcefile: MAIN },
    bundle: true,
    write: false,
    metafile: true,
    format: 'esm',
    target: 'es2024',
    platform: 'neutral',
    mainFields: ['module', 'main'],
    conditions: ['workerd', 'worker', 'browser'],
    external: ['cloudflare:*', 'node:*'],
    logLevel: 'silent',
  });
  const files = Object.keys(metafile.inputs).filter((input) => input !== MAIN);
  const inputs = [...files.map((file) => path.resolve(projectFolder, file)), ...OWN_FILES];
  return { script: outputFiles[0]!.text, inputs };
}

const MAIN = 'edge-main.js';
/** What decides how files become a bundle. */
const OWN_FILES = [
  fileURLToPath(import.meta.url),
  fileURLToPath(import.meta.resolve('esbuild/package.json')),
];

const hashOf = async (files: readonly string[]): Promise<string> =>
  sha256(await Promise.all(files.map((file) => readFile(file))));

const newestChange_ms = async (files: readonly string[]): Promise<number> =>
  Math.max(...(await Promise.all(files.map((file) => stat(file)))).map(({ mtimeMs }) => mtimeMs));

/** Of all parts, each with its length. */
function sha256(parts: readonly (string | Uint8Array)[]): string {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(`${part.length}:`).update(part);
  return hash.digest('hex');
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
