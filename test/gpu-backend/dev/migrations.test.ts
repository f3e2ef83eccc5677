/** Migrations go forward only, in a real D1: each whole or not at all, and none over a database of another version. */
import { cpSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { convertV4MiniflareOptions, Miniflare } from 'miniflare';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { applyMigrations } from '../../../gpu-backend/dev/local-database.ts';

let folder: string;
let miniflare: Miniflare;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'migrations-'));
  miniflare = new Miniflare(
    convertV4MiniflareOptions({
      modules: [{ type: 'ESModule', path: 'a.js', contents: 'export default {}' }],
      d1Databases: { DB: 'db' },
    }),
  );
  cpSync('migrations', path.join(folder, 'migrations'), { recursive: true });
});
afterEach(async () => {
  await miniflare.dispose();
  rmSync(folder, { recursive: true });
});

const inFolder = (name: string) => path.join(folder, 'migrations', name);
const add = (name: string, sql: string) => writeFileSync(inFolder(name), sql);
const database = () => miniflare.getD1Database('DB');
const apply = async () => applyMigrations(await database(), path.join(folder, 'migrations'));
/** All that the database says of itself: its tables and what was applied. */
async function state(): Promise<unknown> {
  const d1 = await database();
  const tables = await d1.prepare('SELECT name, sql FROM sqlite_master ORDER BY name').all();
  const applied = await d1.prepare('SELECT * FROM d1_migrations ORDER BY id').all();
  return [tables.results, applied.results];
}

test('each is applied once, later ones on top', async () => {
  expect((await apply()).length).toBeGreaterThan(0);
  expect(await apply()).toEqual([]);
  add(
    '9999_more.sql',
    "CREATE TABLE more (a TEXT);\n--> statement-breakpoint\nINSERT INTO more VALUES ('x');",
  );
  expect(await apply()).toEqual(['9999_more.sql']);
  expect(await (await database()).prepare('SELECT a FROM more').all()).toMatchObject({
    results: [{ a: 'x' }],
  });
});

test('a file that fails half-way leaves nothing, and can be applied once it is right', async () => {
  await apply();
  add(
    '9999_bad.sql',
    'CREATE TABLE half (a TEXT);\n--> statement-breakpoint\nINSERT INTO nowhere VALUES (1);',
  );
  await expect(apply()).rejects.toThrow(/nowhere/);
  add('9999_bad.sql', 'CREATE TABLE half (a TEXT);');
  expect(await apply()).toEqual(['9999_bad.sql']);
});

/** What another version had, and what this one has. */
const OTHERS: Record<string, () => void> = {
  'with a file more': () => {
    add('9999_future.sql', 'CREATE TABLE future (a TEXT);');
  },
  'with a file between': () => {
    const [last] = readdirSync(path.join(folder, 'migrations'))
      .filter((name) => name.endsWith('.sql'))
      .sort()
      .reverse();
    renameSync(inFolder(last!), inFolder('0009_late.sql'));
    add('0000_early.sql', 'CREATE TABLE early (a TEXT);');
  },
  'with other files': () => {
    rmSync(path.join(folder, 'migrations'), { recursive: true });
    mkdirSync(path.join(folder, 'migrations'));
    for (const index of [0, 1, 2, 3, 4]) add(`000${index}_old.sql`, `CREATE TABLE old_${index} (a TEXT);`);
  },
};

test.each(Object.entries(OTHERS))(
  'a database of another version, %s, is left as it is, and people hear the way out',
  async (_, change) => {
    change();
    await apply();
    rmSync(path.join(folder, 'migrations'), { recursive: true });
    cpSync('migrations', path.join(folder, 'migrations'), { recursive: true });
    add('9998_waiting.sql', 'CREATE TABLE waiting (a TEXT);');
    const before = await state();
    await expect(apply()).rejects.toMatchObject({
      code: 'start_failed',
      message: expect.stringMatching(
        /Another version of Maskroute .* holds \d{4}_.*Nothing was changed.*"backup".*--restore=FILE/,
      ),
    });
    expect(await state()).toEqual(before);
  },
);
