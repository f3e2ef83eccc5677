/**
 * Bundles the dashboard's page into the worker's assets, and writes the pages beside it: what an edge is, and its API.
 * wrangler.toml names this as its build command, so that `npm start`, the tests and `wrangler deploy` all serve what was
 * just built.
 *
 * Names hold the content's hash, each file is written whole, and the page that names them comes last: two builds at
 * once write the same, and a reader never meets a half.
 */
import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';
import manifest from '../package.json' with { type: 'json' };
import { openApi } from '../shared/openapi/document.ts';
import { docsPage, homePage } from '../workers/site/pages.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('..', import.meta.url));
const SOURCE_FOLDER = path.join(PROJECT_FOLDER, 'workers/dashboard');
const SITE_STYLE = path.join(PROJECT_FOLDER, 'workers/site/site.css');
const OUTPUT_FOLDER = path.join(PROJECT_FOLDER, 'workers/assets/dashboard');

export async function buildDashboard(): Promise<void> {
  const { outputFiles, metafile } = await build({
    absWorkingDir: PROJECT_FOLDER,
    entryPoints: [path.join(SOURCE_FOLDER, 'main.tsx'), SITE_STYLE],
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

  const outputs = Object.entries(metafile.outputs);
  const [script, { cssBundle }] = outputs.find(([, { entryPoint }]) => entryPoint?.endsWith('.tsx'))!;
  const [style] = outputs.find(([, { entryPoint }]) => entryPoint?.endsWith('.css'))!;
  const html = (await readFile(path.join(SOURCE_FOLDER, 'index.html'), 'utf8'))
    .replace('main.css', `assets/${path.basename(cssBundle!)}`)
    .replace('main.js', `assets/${path.basename(script)}`);
  await writeWhole(path.join(OUTPUT_FOLDER, 'index.html'), html);

  const api = openApi(manifest.version);
  const styleAddress = `/dashboard/assets/${path.basename(style)}`;
  await writeWhole(path.join(OUTPUT_FOLDER, 'openapi.json'), JSON.stringify(api));
  await writeWhole(path.join(OUTPUT_FOLDER, 'home.html'), String(await homePage(api, styleAddress)));
  await writeWhole(path.join(OUTPUT_FOLDER, 'docs.html'), String(await docsPage(api, styleAddress)));

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

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  parseScript(newCommand('npm run dashboard --', "build the dashboard's page and the documentation"), [
    'npm run dashboard',
  ]);
  await buildDashboard();
}
