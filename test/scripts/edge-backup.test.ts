/** The database of an edge, destroyed and restored: by real wrangler, on a real local D1. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { afterAll, expect, test } from 'vitest';
import { inRestorableOrder } from '../../scripts/edge-backup.ts';

const folder = mkdtempSync(path.join(tmpdir(), 'maskroute-backup-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const CONFIG = path.join(folder, 'wrangler.toml');
const FILE = path.join(folder, 'backup.sql');

function run(...words: string[]): string {
  const env = { ...process.env, CI: '1', WRANGLER_SEND_METRICS: 'false' };
  const { status, stdout, stderr } = spawnSync(words[0]!, words.slice(1), { env, encoding: 'utf8' });
  expect(status, `${words.join(' ')}: ${stdout}${stderr}`).toBe(0);
  return stdout;
}
const script = (action: string) =>
  run(process.execPath, 'scripts/edge-backup.ts', action, FILE, '--local', '--config', CONFIG);

const ROWS = `insert into tenants (id, name, routing_policy, created_at_ms) values ('precious', 'it''s; "so"', 'first_user', 1);
insert into api_keys (id, kind, tenant_id, name, prefix, sha256, created_at_ms) values ('k', 'tenant', 'precious', 'n', 'p', 's', 1);
insert into audit_log (created_at_ms, tenant, actor, address, action, target, request_id) values (1, '', 'root', '', 'POST /x', '/x', 'r'), (2, '', 'root', '', 'POST /y', '/y', 'r');
delete from audit_log where sequence = 2;`;
/** `last_change`: the number of the entry that is gone, which no later one may get. */
const SELECT =
  "select t.id, t.name, k.id as key, (select count(*) from audit_log) as changes, (select seq from sqlite_sequence where name = 'audit_log') as last_change, (select count(*) from d1_migrations) as migrations from tenants t join api_keys k on k.tenant_id = t.id";

/** The local D1 as the file that it is: each command of wrangler would take three seconds to come up. */
function local<T>(act: (database: DatabaseSync) => T): T {
  const d1 = path.join(folder, '.wrangler/state/v3/d1/miniflare-D1DatabaseObject');
  const file = readdirSync(d1).find((name) => /^[0-9a-f]{64}\.sqlite$/.test(name))!;
  using database = new DatabaseSync(path.join(d1, file));
  return act(database);
}
const selected = () => local((database) => database.prepare(SELECT).all());

test('a database that was destroyed comes back whole from one file', () => {
  writeFileSync(
    CONFIG,
    `name = "maskroute"\ncompatibility_date = "2026-08-01"\n[[d1_databases]]\nbinding = "DB"\ndatabase_name = "maskroute"
database_id = "00000000-0000-0000-0000-000000000000"\nmigrations_dir = ${JSON.stringify(path.resolve('migrations'))}\n`,
  );
  run('node_modules/.bin/wrangler', 'd1', 'migrations', 'apply', 'DB', '--local', '--config', CONFIG);
  local((database) => database.exec(ROWS));
  const before = selected();
  expect(before).toMatchObject([
    { id: 'precious', name: `it's; "so"`, key: 'k', changes: 1, last_change: 2 },
  ]);
  script('backup');
  expect(statSync(FILE).mode & 0o777).toBe(0o600);
  rmSync(path.join(folder, '.wrangler'), { recursive: true });
  script('restore');
  expect(selected()).toEqual(before);
  expect(readFileSync(FILE, 'utf8')).toContain('CREATE INDEX');
}, 300_000);

test('a backup that breaks off leaves the one before, and nothing else', () => {
  const place = mkdtempSync(path.join(folder, 'broken-'));
  const file = path.join(place, 'backup.sql');
  writeFileSync(file, 'the one before');
  const bin = mkdtempSync(path.join(folder, 'bin-'));
  writeFileSync(path.join(bin, 'wrangler'), `#!/bin/sh\nprintf half > "${file}.incoming"\nexit 1\n`, {
    mode: 0o700,
  });
  const env = { ...process.env, PATH: `${bin}${path.delimiter}${process.env.PATH}` };
  const { status } = spawnSync(process.execPath, ['scripts/edge-backup.ts', 'backup', file], { env });
  expect(status).toBe(1);
  expect(readdirSync(place)).toEqual(['backup.sql']);
  expect(readFileSync(file, 'utf8')).toBe('the one before');
});

test('a backup into no folder is one line of what is wrong', () => {
  const words = ['scripts/edge-backup.ts', 'backup', path.join(folder, 'nowhere', 'backup.sql')];
  const { status, stderr } = spawnSync(process.execPath, words, { encoding: 'utf8' });
  expect(stderr).toMatch(/^error: ENOENT: .*\n$/);
  expect(status).toBe(1);
});

test('tables come before rows, and a semicolon in a text ends nothing', () => {
  const sql = `PRAGMA a=b;\nINSERT INTO "x" VALUES('a;b''c');\nCREATE INDEX i ON x (y);\nCREATE TABLE x (y -- a; comment\n);\n`;
  expect(
    inRestorableOrder(sql)
      .split(';\n')
      .map((one) => one.slice(0, 12)),
  ).toEqual(['PRAGMA a=b', 'CREATE TABLE', 'INSERT INTO ', 'CREATE INDEX', '']);
});
