/** Copies of the local database: of the real edge's D1, whole, few, and a way back that the edge goes on from. */
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { openBackups, watchFile } from '../../../gpu-backend/dev/local-database.ts';
import { startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { listSchema, tenantSchema } from '../../../shared/admin/admin-wire.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const tenants = { method: 'GET', path: '/tenants' } as const;

let home: string;
beforeEach(() => {
  home = mkdtempSync(path.join(tmpdir(), 'backups-'));
});
afterEach(() => rmSync(home, { recursive: true, force: true }));

/** Runs the edge on the home's state, adds tenants, and gives those that are there then. */
async function withEdge(...added: string[]): Promise<string[]> {
  const edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: path.join(home, 'edge'),
    port: 0,
    bindings: { BACKEND_URL: 'http://127.0.0.1:9', BACKEND_KEY: ADMIN_KEY, ADMIN_KEY },
  });
  try {
    const client = createAdminClient(edge.url, ADMIN_KEY);
    for (const id of added) {
      await client.request({ method: 'POST', path: '/tenants', body: { id, name: id } }, tenantSchema);
    }
    return (await client.request(tenants, listSchema(tenantSchema))).data.map(({ id }) => id).sort();
  } finally {
    await edge.close();
  }
}
const copies = () => readdirSync(path.join(home, 'backup')).sort();
const loseState = () => rmSync(path.join(home, 'edge'), { recursive: true });

test('what was in a database that is gone comes back, and the edge goes on with it', async () => {
  const backups = openBackups(home);
  await backups.backUp();
  expect(await backups.newest()).toBeUndefined();
  await withEdge('first', 'second');
  await backups.backUp();
  const copy = (await backups.newest())!;
  expect(statSync(copy).mode & 0o777).toBe(0o600);
  loseState();
  expect(await backups.database()).toBeUndefined();
  expect(await withEdge('meanwhile')).toEqual(['meanwhile']);
  await backups.restore(copy);
  expect(await withEdge('third')).toEqual(['first', 'second', 'third']);
  // The one that was there at that time was copied before.
  await backups.restore((await backups.newest())!);
  expect(await withEdge()).toEqual(['meanwhile']);
}, 120_000);

/** A database as the edge leaves it, as far as copies look into one. */
function writeDatabase(begun: string, word: string): void {
  const folder = path.join(home, 'edge/d1/miniflare-D1DatabaseObject');
  mkdirSync(folder, { recursive: true });
  const database = new DatabaseSync(path.join(folder, `${'0'.repeat(64)}.sqlite`));
  database.exec(`PRAGMA journal_mode = WAL;
    CREATE TABLE IF NOT EXISTS d1_migrations (id INTEGER PRIMARY KEY, applied_at TEXT);
    INSERT OR IGNORE INTO d1_migrations VALUES (1, '${begun}');
    CREATE TABLE IF NOT EXISTS words (word TEXT); INSERT INTO words VALUES ('${word}');`);
  database.close();
}
const wordsIn = (file: string): string[] => {
  const database = new DatabaseSync(file);
  const rows = database.prepare('SELECT word FROM words').all();
  database.close();
  return rows.map(({ word }) => String(word));
};

test('an unchanged database is copied once, and few copies stay: of a lost one, too', async () => {
  const backups = openBackups(home);
  writeDatabase('2026-01-01 00:00:00', 'kept');
  await backups.backUp();
  await backups.backUp();
  expect(copies()).toHaveLength(1);
  const ofLost = (await backups.newest())!;
  loseState();
  for (let day = 2; day < 4; day++) {
    for (let start = 0; start < 5; start++) {
      writeDatabase(`2026-01-0${day} 00:00:00`, `word-${day}-${start}`);
      await backups.backUp();
    }
    loseState();
  }
  expect(copies()).toHaveLength(7);
  expect(wordsIn(ofLost)).toEqual(['kept']);
  writeDatabase('2026-01-04 00:00:00', 'newest');
  await backups.backUp();
  expect(copies()).toHaveLength(7);
  expect(existsSync(ofLost)).toBe(false);
  expect(wordsIn((await backups.newest())!)).toEqual(['newest']);
});

test('no half-written copy counts, and what is no copy is refused and changes nothing', async () => {
  const backups = openBackups(home);
  writeDatabase('2026-01-01 00:00:00', 'here');
  await backups.backUp();
  const copy = (await backups.newest())!;
  writeFileSync(path.join(home, 'backup', 'incoming-1'), 'half');
  expect(await backups.newest()).toBe(copy);
  const broken = copy.replace(/\d{9}Z~/, '000000000Z~');
  writeFileSync(broken, 'not a database, but long enough to be read as one'.repeat(100));
  for (const file of [broken, path.join(home, 'none.sqlite'), path.join(home, 'edge')]) {
    await expect(backups.restore(file)).rejects.toMatchObject({ code: 'invalid_argument' });
  }
  expect(wordsIn((await backups.database())!)).toEqual(['here']);
});

test('a database that is cut short counts as gone', async () => {
  const backups = openBackups(home);
  writeDatabase('2026-01-01 00:00:00', 'here');
  truncateSync((await backups.database())!, 0);
  expect(await backups.database()).toBeUndefined();
});

test('a database that is damaged or locked is named with the reason, and a copy takes its place', async () => {
  const backups = openBackups(home);
  writeDatabase('2026-01-01 00:00:00', 'here');
  await backups.backUp();
  const file = (await backups.database())!;
  expect(await backups.unreadable()).toBeUndefined();
  const lock = new DatabaseSync(file);
  lock.exec('PRAGMA journal_mode = DELETE; BEGIN EXCLUSIVE');
  expect(await backups.unreadable()).toEqual({ file, cause: 'locked', reason: 'database is locked' });
  lock.close();
  writeFileSync(file, 'not a database, but long enough to be read as one'.repeat(100));
  expect(await backups.unreadable()).toEqual({ file, cause: 'damaged', reason: 'file is not a database' });
  await backups.restore((await backups.newest())!);
  expect(await backups.unreadable()).toBeUndefined();
  expect(wordsIn(file)).toEqual(['here']);
});

test('a database that a full disk keeps from being read is not called damaged', async () => {
  const backups = openBackups(home);
  writeDatabase('2026-01-01 00:00:00', 'here');
  const file = (await backups.database())!;
  const opened = new DatabaseSync(file);
  opened.exec('PRAGMA journal_mode = WAL');
  opened.close();
  const script = `import { openBackups } from './gpu-backend/dev/local-database.ts';
    console.log(JSON.stringify(await openBackups(process.argv[1]).unreadable()));`;
  // A process that may write no file of more than 8 kB: the database's index of its log has 32.
  const limited = `trap '' XFSZ; ulimit -f 8; exec "$0" --input-type=module -e "$1" "$2"`;
  const { stdout } = spawnSync('bash', ['-c', limited, process.execPath, script, home], { encoding: 'utf8' });
  expect(JSON.parse(stdout)).toEqual({ file, cause: 'disk', reason: 'disk I/O error' });
  expect(await backups.unreadable()).toBeUndefined();
});

test('a database that this user may not open is not called damaged', async () => {
  const backups = openBackups(home);
  writeDatabase('2026-01-01 00:00:00', 'here');
  const file = (await backups.database())!;
  const closed = (reason: string) => ({ file, cause: 'closed', reason });
  const opened = new DatabaseSync(file);
  opened.exec('PRAGMA journal_mode = WAL');
  opened.close();
  const script = `import { openBackups } from './gpu-backend/dev/local-database.ts';
    console.log(JSON.stringify(await openBackups(process.argv[1]).unreadable()));`;
  const read = [process.execPath, '--input-type=module', '-e', script, home] as const;
  // Root opens what it likes, unless it gives that right up.
  const held = process.getuid!() === 0 ? ['setpriv', '--bounding-set=-dac_override,-dac_read_search'] : [];
  const [command, ...args] = [...held, ...read];
  const found = () => JSON.parse(spawnSync(command!, args, { encoding: 'utf8' }).stdout);
  chmodSync(file, 0);
  expect(found()).toEqual(closed('unable to open database file'));
  // It may be read, but no log be written beside it.
  chmodSync(file, 0o444);
  chmodSync(path.dirname(file), 0o555);
  expect(found()).toEqual(closed('attempt to write a readonly database'));
  chmodSync(path.dirname(file), 0o755);
});

test('a file that is deleted, or another that takes its place, is noticed once', async () => {
  const file = path.join(home, 'watched');
  for (const change of [() => rmSync(file), () => writeFileSync(`${file}.new`, 'other')]) {
    writeFileSync(file, 'first');
    const onGone = vi.fn();
    const end = watchFile(file, onGone, 10);
    change();
    if (existsSync(`${file}.new`)) rmSync(file);
    await vi.waitFor(() => expect(onGone).toHaveBeenCalledOnce(), 20_000);
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(onGone).toHaveBeenCalledOnce();
    end();
  }
});
