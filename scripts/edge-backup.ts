/**
 * `npm run backup -- FILE` and `npm run restore -- FILE`: the database of a deployed edge as one file of SQL, and back from
 * it into an empty database. Wrangler does both; what it exports does not go back in as it is, since its tables come in the
 * order of their names, and rows are refused whose tenants have no table yet.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';

/** Tables before the rows that name each other's, and indexes at the end. */
const ORDER = [/^PRAGMA\b/i, /^CREATE TABLE\b/i, /^INSERT\b/i, /^/] as const;

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

function wrangler(words: readonly string[]): void {
  const { status } = spawnSync('wrangler', ['d1', ...words], { stdio: 'inherit' });
  if (status !== 0) process.exit(1);
}

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
  if (action === 'restore') {
    wrangler(['execute', 'DB', ...where, '--file', file, '--yes']);
    return;
  }
  const exported = `${file}.incoming`;
  try {
    wrangler(['export', 'DB', ...where, '--output', exported, '--skip-confirmation']);
    writeFileSync(file, inRestorableOrder(readFileSync(exported, 'utf8')), { mode: 0o600 });
    chmodSync(file, 0o600);
  } finally {
    rmSync(exported, { force: true });
  }
}

if (import.meta.main) {
  const [action, ...args] = process.argv.slice(2);
  // npm's scripts name it.
  main(action as keyof typeof ACTIONS, args);
}
