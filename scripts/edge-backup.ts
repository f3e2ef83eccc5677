/**
 * `npm run backup -- FILE` and `npm run restore -- FILE`: the database of a deployed edge as one file of SQL, and back from
 * it into an empty database. Wrangler does both; what it exports does not go back in as it is, since its tables come in the
 * order of their names, and rows are refused whose tenants have no table yet.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

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

const USAGE = `npm run backup -- FILE [--env production] [--local]
npm run restore -- FILE [--env production] [--local]     into a database that is empty`;

function main([action, ...args]: string[]): void {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      env: { type: 'string' },
      local: { type: 'boolean', default: false },
      config: { type: 'string' },
    },
  });
  const [file] = positionals;
  if (file === undefined || (action !== 'backup' && action !== 'restore')) {
    console.error(USAGE);
    process.exit(2);
  }
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

if (import.meta.main) main(process.argv.slice(2));
