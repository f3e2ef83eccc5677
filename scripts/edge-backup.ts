/**
 * `npm run backup -- FILE` and `npm run restore -- FILE`: export the database of a deployed edge to a SQL file, and import it
 * into an empty database, with wrangler. Wrangler's export must be reordered first: it is sorted by table names, and rows
 * are refused when they reference a table that does not exist yet.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';

/**
 * All tables before the rows, which reference other tables; indexes at the end. The export empties `sqlite_sequence` before
 * it inserts its rows, so DELETE statements keep their place among the rows.
 */
const ORDER = [/^PRAGMA\b/i, /^CREATE TABLE\b/i, /^(INSERT|DELETE)\b/i, /^/] as const;

export function inRestorableOrder(sql: string): string {
  const statements = statementsIn(sql);
  const rankOf = (statement: string) => ORDER.findIndex((kind) => kind.test(statement));
  return statements
    .toSorted((a, b) => rankOf(a) - rankOf(b))
    .map((statement) => `${statement};\n`)
    .join('');
}

/** Splits SQL at semicolons outside of strings, quoted names and comments. */
function statementsIn(sql: string): string[] {
  const parts =
    sql.match(/'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|--[^\n]*|\/\*[\s\S]*?\*\/|;|[^'"`;/-]+|[-/]/g) ??
    [];
  const statements: string[] = [];
  let current = '';
  for (const part of parts) {
    if (part !== ';') current += part;
    else {
      statements.push(current.trim());
      current = '';
    }
  }
  return [...statements, current.trim()].filter((statement) => statement !== '');
}

/** Runs `wrangler d1`; returns whether it succeeded. Wrangler prints its own errors. */
const wrangler = (...words: string[]): boolean =>
  spawnSync('wrangler', ['d1', ...words], { stdio: 'inherit' }).status === 0;

type Options = { readonly env?: string; readonly local: boolean; readonly config?: string };

const ACTIONS = {
  backup: 'write the database of a deployed edge to a file',
  restore: 'import a backup into an empty database',
};

function main(action: keyof typeof ACTIONS, args: readonly string[]): void {
  const command = newCommand(`npm run ${action} --`, ACTIONS[action])
    .argument('<file>', 'the backup, SQL')
    .option('--env <name>', "an environment of wrangler.toml (default: the top level's)")
    .option('--local', "wrangler's local database, in place of the deployed one", false)
    .option('--config <file>', 'another wrangler.toml');
  const values = parseScript<Options>(command, [`npm run ${action} -- backup.sql --env production`], args);
  const file = command.args[0]!;
  const where = [
    ...(values.env === undefined ? [] : ['--env', values.env]),
    ...(values.config === undefined ? [] : ['--config', values.config]),
    values.local ? '--local' : '--remote',
  ];
  const isDone =
    action === 'restore' ? wrangler('execute', 'DB', ...where, '--file', file, '--yes') : backUp(file, where);
  if (!isDone) process.exitCode = 1;
}

/** Writes a backup; an older file of that name is replaced only when the new backup is complete. */
function backUp(file: string, where: readonly string[]): boolean {
  const incoming = `${file}.incoming`;
  try {
    // Created with mode 0600 first, so that no other user can ever read it.
    writeFileSync(incoming, '', { mode: 0o600 });
    if (!wrangler('export', 'DB', ...where, '--output', incoming, '--skip-confirmation')) return false;
    writeFileSync(incoming, inRestorableOrder(readFileSync(incoming, 'utf8')), { flush: true });
    chmodSync(incoming, 0o600);
    renameSync(incoming, file);
    return true;
  } finally {
    rmSync(incoming, { force: true });
  }
}

if (import.meta.main) {
  const [action, ...args] = process.argv.slice(2);
  try {
    // The npm script passes the action.
    main(action as keyof typeof ACTIONS, args);
  } catch (error) {
    sayError(error);
  }
}
