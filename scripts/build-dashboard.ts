/**
 * Bundles the dashboard's page into the worker's assets. wrangler.toml names this as its build command, so that
 * `npm start`, the tests and `wrangler deploy` all serve what was just built.
 *
 * Names hold the content's hash, each file is written whole, and the page that names them comes last: two builds at
 * once write the same, and a reader never meets a half.
 */
import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const PROJECT_FOLDER = fileURLToPath(new URL('..', import.meta.url));
const SOURCE_FOLDER = path.join(PROJECT_FOLDER, 'workers/dashboard');
const OUTPUT_FOLDER = path.join(PROJECT_FOLDER, 'workers/assets/dashboard');

export async function buildDashboard(): Promise<void> {
  const { outputFiles, metafile } = await build({
    absWorkingDir: PROJECT_FOLDER,
    entryPoints: [path.join(SOURCE_FOLDER, 'main.tsx')],
    outdir: path.join(OUTPUT_FOLDER, 'assets'),
    entryNames: '[name]-[hash]',
    chunkNames: '[name]-[hash]',
    bundle: true,
    splitting: true,
    format: 'esm',
    target: 'es2022',
    minify: true,
    write: false,
    metafile: true,
    tsconfig: path.join(SOURCE_FOLDER, 'tsconfig.json'),
    define: { 'process.env.NODE_ENV': '"production"' },
    logLevel: 'warning',
  });
  await mkdir(path.join(OUTPUT_FOLDER, 'assets'), { recursive: true });
  for (const { path: file, contents } of outputFiles) await writeWhole(file, contents);

  const entry = Object.entries(metafile.outputs).find(([, output]) => output.entryPoint !== undefined);
  const [script, { cssBundle }] = entry!;
  const html = (await readFile(path.join(SOURCE_FOLDER, 'index.html'), 'utf8'))
    .replace('main.css', `assets/${path.basename(cssBundle!)}`)
    .replace('main.js', `assets/${path.basename(script)}`);
  await writeWhole(path.join(OUTPUT_FOLDER, 'index.html'), html);

  const current = new Set(outputFiles.map((file) => path.basename(file.path)));
  for (const name of await readdir(path.join(OUTPUT_FOLDER, 'assets'))) {
    const isOthers = name.endsWith('.half');
    if (!isOthers && !current.has(name)) await rm(path.join(OUTPUT_FOLDER, 'assets', name), { force: true });
  }
}

async function writeWhole(file: string, content: string | Uint8Array): Promise<void> {
  const half = `${file}.${process.pid}.half`;
  await writeFile(half, content);
  await rename(half, file);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await buildDashboard();
