/**
 * Applies the numbered SQL files to a D1 database, forward only. Which ones it has is kept where wrangler
 * keeps it (`d1_migrations`), so either may go on where the other stopped.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** The part of D1 that is needed here, as Miniflare hands it to Node. */
interface MigrationDatabase {
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
 * @throws MaskrouteError `start_failed` when the database did not begin with the files of this folder, in their order:
 * then nothing is applied.
 */
export async function applyMigrations(database: MigrationDatabase, folder: string): Promise<string[]> {
  await database.prepare(CREATE_TABLE).run();
  const { results } = await database.prepare('SELECT name FROM d1_migrations ORDER BY id').all();
  const applied = results.map((row) => (row as { name: string }).name);
  const files = (await readdir(folder)).filter((name) => FILE_PATTERN.test(name)).sort();
  const foreign = applied.filter((name, index) => name !== files[index]);
  if (foreign.length > 0) throw ofAnotherVersion(foreign);
  const waiting = files.slice(applied.length);
  for (const name of waiting) {
    const sql = await readFile(path.join(folder, name), 'utf8');
    await database.batch([
      ...statements(sql).map((statement) => database.prepare(statement)),
      database.prepare('INSERT INTO d1_migrations(name) VALUES(?)').bind(name),
    ]);
  }
  return waiting;
}

const NAMES_MAX = 3;

function ofAnotherVersion(foreign: readonly string[]): MaskrouteError {
  const more = foreign.length > NAMES_MAX ? ` and ${foreign.length - NAMES_MAX} more` : '';
  return new MaskrouteError(
    'start_failed',
    `Another version of Maskroute made the local database: it holds ${foreign.slice(0, NAMES_MAX).join(', ')}${more}, \
which do not belong to this version. Nothing was changed. Go on with the version that made it; or delete the folder \
"edge" in the home of Maskroute (MASKROUTE_HOME, or ~/.cache/maskroute) to begin with an empty database. The folder \
"backup" beside it keeps a copy of the old one, and "npm start -- --restore=FILE" puts a copy back.`,
  );
}

const statements = (sql: string): string[] =>
  sql
    .split(STATEMENT_BREAK)
    .map((statement) => statement.trim())
    .filter((statement) => statement !== '');
