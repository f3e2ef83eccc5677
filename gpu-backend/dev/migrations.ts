/**
 * Applies the numbered SQL files to a D1 database, forward only. Which ones it has is kept where wrangler
 * keeps it (`d1_migrations`), so either may go on where the other stopped.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** The part of D1 that is needed here, as Miniflare hands it to Node. */
export interface MigrationDatabase {
  prepare(sql: string): MigrationStatement;
  batch(statements: MigrationStatement[]): Promise<unknown>;
}
interface MigrationStatement {
  bind(...values: unknown[]): MigrationStatement;
  all(): Promise<{ results: unknown[] }>;
  run(): Promise<unknown>;
}

const CREATE_TABLE = `CREATE TABLE IF NOT EXISTS d1_migrations(
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT UNIQUE,
  applied_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP NOT NULL
)`;
const FILE_PATTERN = /^\d{4}_.+\.sql$/;
/** drizzle-kit writes this between two statements; D1 takes one statement at a time. */
const STATEMENT_BREAK = '--> statement-breakpoint';

/**
 * The names that were applied now. Each file is one atomic batch with its own entry in `d1_migrations`.
 * @throws MaskrouteError `start_failed` when the database has migrations that the folder lacks.
 */
export async function applyMigrations(database: MigrationDatabase, folder: string): Promise<string[]> {
  await database.prepare(CREATE_TABLE).run();
  const { results } = await database.prepare('SELECT name FROM d1_migrations ORDER BY id').all();
  const applied = new Set(results.map((row) => (row as { name: string }).name));
  const files = (await readdir(folder)).filter((name) => FILE_PATTERN.test(name)).sort();
  const unknown = [...applied].filter((name) => !files.includes(name));
  if (unknown.length > 0) {
    throw new MaskrouteError(
      'start_failed',
      `The local database is newer than this version of Maskroute: it has ${unknown.join(', ')}.`,
    );
  }
  const waiting = files.filter((name) => !applied.has(name));
  for (const name of waiting) {
    const sql = await readFile(path.join(folder, name), 'utf8');
    await database.batch([
      ...statements(sql).map((statement) => database.prepare(statement)),
      database.prepare('INSERT INTO d1_migrations(name) VALUES(?)').bind(name),
    ]);
  }
  return waiting;
}

const statements = (sql: string): string[] =>
  sql
    .split(STATEMENT_BREAK)
    .map((statement) => statement.trim())
    .filter((statement) => statement !== '');
