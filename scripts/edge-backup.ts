/**
 * `npm run backup -- FILE` and `npm run restore -- FILE`: the database of a deployed edge as one file of SQL, and back from
 * it into an empty database. Wrangler does both; what it exports does not go back in as it is, since its tables come in the
 * order of their names, and rows are refused whose tenants have no table yet.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';

/**
 * Tables before the rows that name each other's, and indexes at the end. SQLite's own table of the last number of each
 * table is emptied before its rows come, so that deletions stay among the rows.
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

/** Split at semicolons outside of texts, names and comments. */
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

/** Whether it did it; it says itself why not. */
const wrangler = (...words: string[]): boolean =>
  spawnSync('wrangler', ['d1', ...words], { stdio: 'inherit' }).status === 0;

type Options = { readonly env?: string; readonly local: boolean; readonly config?: string };

const ACTIONS = {
  backup: 'write the database of a deployed edge to a file',
  restore: 'put a backup into a database that is empty',
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

/** An older backup of that name stays until the new one is whole. */
function backUp(file: string, where: readonly string[]): boolean {
  const incoming = `${file}.incoming`;
  try {
    // Nobody else reads what is in it, also before it is whole.
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
    // npm's scripts name it.
    main(action as keyof typeof ACTIONS, args);
  } catch (error) {
    sayError(error);
  }
}
