/**
 * The edge's local database: its migrations and its backups.
 *
 * Migrations are the numbered SQL files, forward only. Applied ones are recorded in wrangler's table `d1_migrations`, so
 * that wrangler and this code can continue each other's work.
 */
import { existsSync, statSync } from 'node:fs';
import { chmod, copyFile, mkdir, readdir, readFile, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** The part of D1's interface that is used here. */
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
/** drizzle-kit's separator of statements; D1 prepares one statement at a time. */
const STATEMENT_BREAK = '--> statement-breakpoint';

/**
 * Applies the migrations that the database lacks, each file as one atomic batch with its entry in `d1_migrations`.
 * @returns the names of the files applied.
 * @throws MaskrouteError `start_failed` when the applied migrations are not the first files of this folder, in order; then
 * nothing is changed.
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

/*
 * Backups of the local database, made when `npm start` begins and ends, and their restoration. All tenants, keys, mask sets
 * and counts are in a single file below a cache folder, which is easily deleted by mistake.
 */

/** Where Miniflare keeps a D1 below its state; the file's name is a hash of the database's. */
const D1_FOLDER = 'd1/miniflare-D1DatabaseObject';
const DATABASE_FILE = /^[0-9a-f]{64}\.sqlite$/;
/** A backup's name: when it was made, when its database was created, the database's file name. */
const BACKUP_FILE = /^(\d{8}T\d{9}Z)~(\d{8}T\d{6})~([0-9a-f]{64}\.sqlite)$/;
/** Copies kept of each database, and databases with copies: those of a lost database outlive its empty replacement. */
const KEPT = { copies: 3, databases: 3 } as const;

export type Backups = {
  /** The file of the database; undefined when there is none, or none with tables in it. */
  database(): Promise<string | undefined>;
  /** A database file that exists but cannot be read, and why. */
  unreadable(): Promise<Unreadable | undefined>;
  /** The newest copy; undefined when there is none. */
  newest(): Promise<string | undefined>;
  /** Copies the database if it was written since the last copy. Nobody may write to it meanwhile. */
  backUp(): Promise<void>;
  /** Replaces the database by a copy, after copying the database itself. @throws MaskrouteError `invalid_argument`. */
  restore(file: string): Promise<void>;
};

/**
 * `locked`: by another program. `disk`: it is full, or fails, which says nothing about the file. `closed`: SQLite cannot open the
 * file or its log, mostly because they belong to another user.
 */
type Unreadable = {
  readonly file: string;
  readonly cause: 'locked' | 'disk' | 'closed' | 'damaged';
  readonly reason: string;
};

/** SQLite's result codes; the upper bits of `errcode` are details. */
const CAUSES: Readonly<Record<number, Unreadable['cause']>> = {
  5: 'locked',
  8: 'closed',
  10: 'disk',
  13: 'disk',
  14: 'closed',
};

const causeOf = (error: Error & { readonly errcode?: number }): Unreadable['cause'] =>
  CAUSES[(error.errcode ?? 0) & 0xff] ?? 'damaged';

/** `home/edge` is the edge's state, `home/backup` has the copies. */
export function openBackups(home: string): Backups {
  const databases = path.join(home, 'edge', D1_FOLDER);
  const copies = path.join(home, 'backup');

  const files = async (): Promise<string[]> =>
    (await namesIn(databases))
      .filter((name) => DATABASE_FILE.test(name))
      .map((name) => path.join(databases, name));
  const database = async (): Promise<string | undefined> => {
    const byAge = (await files()).sort((a, b) => writtenAt_ms(b) - writtenAt_ms(a));
    return byAge.find((file) => begunAt(file) !== undefined);
  };
  const unreadable = async () => {
    for (const file of await files()) {
      try {
        withDatabase(file, (opened) => opened.prepare('SELECT name FROM sqlite_master').all());
      } catch (error) {
        return { file, cause: causeOf(error as Error), reason: (error as Error).message };
      }
    }
    return undefined;
  };
  /** Newest first. */
  const list = async (): Promise<string[]> =>
    (await namesIn(copies))
      .filter((name) => BACKUP_FILE.test(name))
      .sort()
      .reverse();
  const newest = async () => {
    const [name] = await list();
    return name === undefined ? undefined : path.join(copies, name);
  };

  const backUp = async (): Promise<void> => {
    const file = await database();
    if (file === undefined) return;
    const last = await newest();
    if (last?.endsWith(path.basename(file)) && writtenAt_ms(last) >= writtenAt_ms(file)) return;
    await mkdir(copies, { recursive: true, mode: 0o700 });
    const name = `${compact(new Date().toISOString())}~${compact(begunAt(file)!)}~${path.basename(file)}`;
    const incoming = path.join(copies, `incoming-${process.pid}`);
    await rm(incoming, { force: true });
    try {
      copyWhole(file, incoming);
      await chmod(incoming, 0o600);
      await rename(incoming, path.join(copies, name));
    } finally {
      await rm(incoming, { force: true });
    }
    for (const old of superseded(await list())) await rm(path.join(copies, old), { force: true });
  };

  return {
    database,
    unreadable,
    newest,
    backUp,
    async restore(file) {
      const name = BACKUP_FILE.exec(path.basename(file))?.[3];
      if (name === undefined || !existsSync(file) || begunAt(file) === undefined) {
        throw new MaskrouteError(
          'invalid_argument',
          `${file} is not a copy of a database; copies are in ${copies}.`,
        );
      }
      await mkdir(databases, { recursive: true });
      const incoming = path.join(databases, 'incoming');
      await copyFile(file, incoming);
      await backUp();
      const place = path.join(databases, name);
      // SQLite would apply the old database's leftover journal to the new file.
      for (const beside of ['-wal', '-shm']) await rm(place + beside, { force: true });
      await rename(incoming, place);
    },
  };
}

/** Calls `onGone` once when the file is deleted or replaced. @returns a function that ends the watch. */
export function watchFile(file: string, onGone: () => void, every_ms = 1_000): () => void {
  const inode = (): number | undefined => statSync(file, { throwIfNoEntry: false })?.ino;
  const before = inode();
  const timer = setInterval(() => {
    if (inode() === before) return;
    clearInterval(timer);
    onGone();
  }, every_ms);
  timer.unref();
  return () => clearInterval(timer);
}

const namesIn = async (folder: string): Promise<string[]> =>
  existsSync(folder) ? await readdir(folder) : [];

const compact = (time: string): string => time.replace(/[-:. ]/g, '').replace(/^(\d{8})(\d{6})$/, '$1T$2');

/** Time of the last write, which may be in the write-ahead log only. */
const writtenAt_ms = (file: string): number =>
  Math.max(...[file, `${file}-wal`].map((one) => statSync(one, { throwIfNoEntry: false })?.mtimeMs ?? 0));

/** When the database's first migration was applied; undefined for a file that is not a database of the edge. */
function begunAt(file: string): string | undefined {
  try {
    return withDatabase(file, (database) => {
      const row = database.prepare('SELECT applied_at FROM d1_migrations ORDER BY id LIMIT 1').get();
      return row === undefined ? undefined : String(row.applied_at);
    });
  } catch {
    return undefined;
  }
}

/** Copies a database with its write-ahead log into one file. */
const copyWhole = (file: string, copy: string): void =>
  withDatabase(file, (database) => {
    database.exec('PRAGMA wal_checkpoint(TRUNCATE)');
    database.prepare('VACUUM INTO ?').run(copy);
  });

function withDatabase<T>(file: string, work: (database: DatabaseSync) => T): T {
  const database = new DatabaseSync(file, { timeout: 1_000 });
  try {
    return work(database);
  } finally {
    database.close();
  }
}

/** The backups to delete; `names` are sorted, newest first. */
function superseded(names: readonly string[]): string[] {
  const seen = new Map<string, number>();
  return names.filter((name) => {
    const begun = BACKUP_FILE.exec(name)![2]!;
    if (!seen.has(begun) && seen.size >= KEPT.databases) return true;
    const copies = (seen.get(begun) ?? 0) + 1;
    seen.set(begun, copies);
    return copies > KEPT.copies;
  });
}
