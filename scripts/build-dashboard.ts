/**
 * Bundles the dashboard into the worker's assets, and writes the pages `/` and `/docs` and openapi.json beside it.
 * It is the build command of wrangler.toml, so `npm start`, the tests and `wrangler deploy` all serve the current sources.
 * It does nothing if the sources did not change since the last build.
 *
 * File names contain the content's hash, files are written atomically, and index.html is written after the files that it
 * names. So two builds may run at once, and readers never see half a build.
 */
import { createHash } from 'node:crypto';
import { existsSync, globSync, readFileSync } from 'node:fs';
import { mkdir, readdir, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';
import { readOwnJson, writeWhole } from '../gpu-backend/files.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('..', import.meta.url));
const SOURCE_FOLDER = path.join(PROJECT_FOLDER, 'workers/dashboard');
const SITE_STYLE = path.join(PROJECT_FOLDER, 'workers/site/site.css');
const OUTPUT_FOLDER = path.join(PROJECT_FOLDER, 'workers/assets/dashboard');

/** The inputs of a build; the lock file stands for the libraries. */
const SOURCES = [
  '{workers/dashboard,workers/site,shared}/**/*.*',
  'scripts/build-dashboard.ts',
  'package{,-lock}.json',
];
const RECORDS_FOLDER = path.join(PROJECT_FOLDER, 'node_modules/.cache/dashboard');
/**
 * Records the last build: the hash of its sources, and the files that it wrote, relative to this checkout. Checkouts may share
 * their libraries by a link, and each has its own: else every start of an edge in one would build anew what another has built.
 */
const BUILT_FILE = path.join(
  RECORDS_FOLDER,
  `${createHash('sha256').update(PROJECT_FOLDER).digest('hex')}.json`,
);

const builtSchema = z.object({ checkout: z.string(), sources: z.string(), files: z.array(z.string()) });

export async function buildDashboard(): Promise<void> {
  const sources = hashOfSources();
  if (await isBuilt(sources)) return;
  await rm(BUILT_FILE, { force: true });
  const written = await writeBuild();
  const files = written.map((file) => path.relative(PROJECT_FOLDER, file));
  await mkdir(RECORDS_FOLDER, { recursive: true });
  await writeWhole(BUILT_FILE, JSON.stringify({ checkout: PROJECT_FOLDER, sources, files }));
  await forgetGoneCheckouts(RECORDS_FOLDER);
}

/** Deletes the records of checkouts that are no longer there, and those that say of none: there would be more and more. */
export async function forgetGoneCheckouts(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    // Another build writes it at this moment.
    if (name.startsWith('.')) continue;
    const file = path.join(folder, name);
    const record = await readOwnJson(file, builtSchema);
    if (record === undefined || !existsSync(record.checkout)) await rm(file, { force: true });
  }
}

function hashOfSources(): string {
  const hash = createHash('sha256');
  for (const file of globSync(SOURCES, { cwd: PROJECT_FOLDER }).sort()) {
    hash.update(`${file}\0`).update(readFileSync(path.join(PROJECT_FOLDER, file)));
  }
  return hash.digest('hex');
}

async function isBuilt(sources: string): Promise<boolean> {
  const built = await readOwnJson(BUILT_FILE, builtSchema);
  return (
    built?.sources === sources && built.files.every((file) => existsSync(path.join(PROJECT_FOLDER, file)))
  );
}

/** Builds all files. @returns their paths. */
async function writeBuild(): Promise<string[]> {
  // Imported here, as most calls have nothing to build.
  const [{ build }, { openApi }, { docsPage, homePage }, { default: manifest }] = await Promise.all([
    import('esbuild'),
    import('../shared/openapi/document.ts'),
    import('../workers/site/pages.ts'),
    import('../package.json', { with: { type: 'json' } }),
  ]);
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
  const written: string[] = [];
  const write = async (file: string, content: string | Uint8Array) => {
    await writeWhole(file, content);
    written.push(file);
  };
  for (const { path: file, contents } of outputFiles) await write(file, contents);

  const outputs = Object.entries(metafile.outputs);
  const [script, { cssBundle }] = outputs.find(([, { entryPoint }]) => entryPoint?.endsWith('.tsx'))!;
  const [style] = outputs.find(([, { entryPoint }]) => entryPoint?.endsWith('.css'))!;
  const html = (await readFile(path.join(SOURCE_FOLDER, 'index.html'), 'utf8'))
    .replace('main.css', `assets/${path.basename(cssBundle!)}`)
    .replace('main.js', `assets/${path.basename(script)}`);
  await write(path.join(OUTPUT_FOLDER, 'index.html'), html);

  const api = openApi(manifest.version);
  const styleAddress = `/dashboard/assets/${path.basename(style)}`;
  await write(path.join(OUTPUT_FOLDER, 'openapi.json'), JSON.stringify(api));
  await write(path.join(OUTPUT_FOLDER, 'home.html'), String(await homePage(api, styleAddress)));
  await write(path.join(OUTPUT_FOLDER, 'docs.html'), String(await docsPage(api, styleAddress)));

  const current = new Set(outputFiles.map((file) => path.basename(file.path)));
  for (const name of await readdir(path.join(OUTPUT_FOLDER, 'assets'))) {
    const isOthers = name.startsWith('.');
    if (!isOthers && !current.has(name)) await rm(path.join(OUTPUT_FOLDER, 'assets', name), { force: true });
  }
  return written;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  parseScript(newCommand('npm run dashboard --', "build the dashboard's page and the documentation"), [
    'npm run dashboard',
  ]);
  await buildDashboard().catch(sayError);
}
