/**
 * `npm run imports`: checks the rules about which folder may import which. ARCHITECTURE.md says why, and
 * test/scripts/import-rules.test.ts proves that each rule can fail. Exits with 1 when a rule is broken.
 */
import { existsSync, globSync, readFileSync } from 'node:fs';
import { isBuiltin } from 'node:module';
import path from 'node:path';
import { type Expression, parseSync, Visitor } from 'oxc-parser';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';

/** Regular expressions for files, or for `node:` and `npm:` names. */
type Side = { readonly path?: string; readonly pathNot?: string };
type Rule = {
  readonly name: string;
  readonly why: string;
  readonly from: Side;
  readonly to: Side;
};

const forbid = (name: string, why: string, from: Side, to: Side): Rule => ({ name, why, from, to });

const ONLINE = '^gpu-backend/((api|jobs|engine|grammar|encoder|onnx|model)/|main\\.ts$)';
const ENTRY_POINTS = '^gpu-backend/(cli|dev|bench)/';
const STAGES = 'data → masks → evaluation → publication: an earlier stage never needs a later one.';

/** The folders of the edge, lowest first. services.ts is between `counting` and `http`. */
const EDGE_ORDER = [
  ...['base', 'db', 'backends', 'tenants', 'routing', 'releases', 'counting'],
  ...['http', 'requests', 'admin'],
];

export const RULES: readonly Rule[] = [
  forbid(
    'shared-is-pure',
    'Both sides run shared/, so it knows neither of them.',
    { path: '^shared/' },
    { path: '^(workers|gpu-backend|scripts|test)/' },
  ),
  forbid(
    'shared-has-no-io',
    'shared/ computes; reading files or sockets is for the two sides.',
    { path: '^shared/' },
    { path: '^node:' },
  ),
  forbid(
    'workers-know-no-backend',
    'The edge and the backend meet in shared/wire/protocol.ts and over HTTP only.',
    { path: '^workers/' },
    { path: '^(gpu-backend|scripts|test)/' },
  ),
  forbid(
    'backend-knows-no-workers',
    'The edge and the backend meet in shared/wire/protocol.ts and over HTTP only.',
    { path: '^gpu-backend/' },
    { path: '^(workers|test)/' },
  ),
  forbid(
    'one-file-imports-onnxruntime',
    'One file knows the runtime, so that another runtime or version touches one file.',
    { pathNot: '^gpu-backend/onnx/session\\.ts$' },
    { path: '^npm:onnxruntime-' },
  ),
  forbid(
    'only-db-knows-columns',
    'Queries have names outside workers/db; tables and columns do not leave it.',
    { path: '^(workers|shared|gpu-backend)/', pathNot: '^workers/db/' },
    { path: '^workers/db/schema|^npm:drizzle-orm$' },
  ),
  forbid(
    'engine-below-api',
    'A request goes api → engine; nothing below knows what is above it.',
    { path: '^gpu-backend/(engine|grammar)/' },
    { path: '^gpu-backend/api/' },
  ),
  forbid(
    'offline-data-first',
    STAGES,
    { path: '^gpu-backend/learning/(data|autodiff)/' },
    { path: '^gpu-backend/(learning/(gates|surrogates|search|units|evaluation)|publication)/' },
  ),
  forbid(
    'offline-masks-second',
    STAGES,
    { path: '^gpu-backend/learning/(gates|surrogates|search|units)/' },
    { path: '^gpu-backend/(learning/evaluation|publication)/' },
  ),
  forbid(
    'offline-evaluation-third',
    STAGES,
    { path: '^gpu-backend/learning/' },
    { path: '^gpu-backend/publication/' },
  ),
  forbid(
    'steps-know-no-search',
    'A search composes training steps; no step knows the search that it is part of.',
    { path: '^gpu-backend/learning/(gates|surrogates)/' },
    { path: '^gpu-backend/learning/(search|units)/' },
  ),
  forbid(
    'serving-needs-no-learning',
    'What answers requests starts without what learns masks.',
    { path: ONLINE },
    { path: '^gpu-backend/learning/' },
  ),
  forbid(
    'only-jobs-publish',
    'Requests need no admin key: of what answers them only jobs publish.',
    { path: ONLINE, pathNot: '^gpu-backend/jobs/' },
    { path: '^gpu-backend/publication/' },
  ),
  forbid(
    'graphs-know-no-server',
    'Models and graphs are below the engine.',
    { path: '^gpu-backend/(onnx|model)/' },
    { path: '^gpu-backend/(api|engine|grammar)/' },
  ),
  forbid(
    'wiring-at-entry-points',
    'Commands and the development runner compose parts; no part knows who composes it.',
    { path: '^(gpu-backend|workers|shared)/', pathNot: ENTRY_POINTS },
    { path: ENTRY_POINTS },
  ),
  ...EDGE_ORDER.slice(0, -1).map((folder, index) =>
    forbid(
      `edge-order-${folder}`,
      `At the edge a folder knows only those before it: ${EDGE_ORDER.join(' → ')}.`,
      { path: `^workers/${folder}/` },
      { path: `^workers/(${EDGE_ORDER.slice(index + 1).join('|')})/` },
    ),
  ),
  forbid(
    'edge-services-wire-subjects',
    'services.ts wires the subjects together; what concerns HTTP stands on top of it, and app.ts composes that.',
    { path: `^workers/(${EDGE_ORDER.slice(0, EDGE_ORDER.indexOf('http')).join('|')})/` },
    { path: '^workers/(services|app|index)\\.ts' },
  ),
  forbid(
    'edge-is-composed-once',
    'No endpoint knows the app that it is part of.',
    { path: '^workers/(http|requests|admin|services\\.ts)' },
    { path: '^workers/(app|index)\\.ts' },
  ),
  forbid(
    'dashboard-is-a-client',
    'The page runs in a browser and meets the edge over HTTP and in shared/ only.',
    { path: '^workers/dashboard/' },
    { path: '^workers/(?!dashboard/)|^node:' },
  ),
  forbid(
    'edge-serves-the-page-unread',
    'The worker delivers pages as files that the build wrote; what makes them does not get into it.',
    { path: '^workers/(?!(dashboard|site)/)' },
    { path: '^workers/(dashboard|site)/' },
  ),
  forbid(
    'no-test-code-in-the-product',
    'Tests and scripts use the product, never the other way round.',
    { path: '^(gpu-backend|workers|shared)/' },
    { path: '^(test|scripts)/' },
  ),
];

type Violation = { readonly rule: string; readonly why: string; readonly what: string };

const isOn = ({ path, pathNot }: Side, name: string): boolean =>
  (path === undefined || new RegExp(path).test(name)) && !(pathNot && new RegExp(pathNot).test(name));

/** All imports in `folders` that break a rule, do not resolve, or close a cycle. */
export function checkImports(root: string, folders: readonly string[]): Violation[] {
  const imports = readImports(root, folders);
  const arrow = ({ from, to }: Import) => `${from} → ${to}`;
  const broken = RULES.flatMap(({ name, why, from, to }) =>
    imports
      .filter((edge) => isOn(from, edge.from) && isOn(to, edge.to))
      .map((edge) => ({ rule: name, why, what: arrow(edge) })),
  );
  const dangling = imports
    .filter((edge) => !edge.resolved)
    .map((edge) => ({ rule: 'resolvable', why: 'There is no such file.', what: arrow(edge) }));
  const why = 'A cycle hides which of its modules decides.';
  const cycles = findCycles(imports).map((files) => ({ rule: 'no-cycles', why, what: files.join(' → ') }));
  return [...broken, ...dangling, ...cycles];
}

/*
 * Reads the imports of every source file from its syntax tree: static, dynamic and type-only imports, and
 * `new URL('./x.ts', import.meta.url)`, which names the files of threads and child processes.
 */

type Import = {
  /** Relative to the root, with forward slashes. */
  readonly from: string;
  /** A file relative to the root, `node:…`, or `npm:` and a package's name. */
  readonly to: string;
  /** False for a relative import of a file that does not exist. */
  readonly resolved: boolean;
};

/** Every import in the `.ts` and `.tsx` files below `folders` of `root`. @throws Error for a file that does not parse. */
export function readImports(root: string, folders: readonly string[]): Import[] {
  const files = globSync(
    folders.map((folder) => `${folder}/**/*.{ts,tsx}`),
    { cwd: root },
  ).sort();
  return files.flatMap((file) => {
    const from = file.split(path.sep).join('/');
    const names = importedNames(from, readFileSync(path.join(root, file), 'utf8'));
    return names.map((name) => ({ from, ...resolve(root, from, name) }));
  });
}

function importedNames(file: string, text: string): string[] {
  const { program, errors } = parseSync(file, text);
  if (errors.length > 0) throw new Error(`${file}: ${errors[0]!.message}`);
  const names: string[] = [];
  const add = (node: Expression | null) => {
    if (node?.type === 'Literal' && typeof node.value === 'string') names.push(node.value);
  };
  new Visitor({
    ImportDeclaration: (node) => add(node.source),
    ExportNamedDeclaration: (node) => add(node.source),
    ExportAllDeclaration: (node) => add(node.source),
    ImportExpression: (node) => add(node.source),
    TSImportType: (node) => add(node.source),
    NewExpression({ callee, arguments: [target, base] }) {
      const isUrl =
        callee.type === 'Identifier' && callee.name === 'URL' && base?.type === 'MemberExpression';
      if (!isUrl || target?.type !== 'Literal') return;
      const name = String(target.value);
      // A URL's name is relative, with or without a leading dot.
      if (name.endsWith('.ts')) names.push(name.startsWith('.') ? name : `./${name}`);
    },
  }).visit(program);
  return names;
}

function resolve(root: string, from: string, name: string): Omit<Import, 'from'> {
  if (name.startsWith('.')) {
    const to = path.posix.join(path.posix.dirname(from), name);
    return { to, resolved: existsSync(path.join(root, to)) };
  }
  if (isBuiltin(name)) return { to: name.startsWith('node:') ? name : `node:${name}`, resolved: true };
  const packageName = name.split('/', name.startsWith('@') ? 2 : 1).join('/');
  return { to: `npm:${packageName}`, resolved: true };
}

/** Import cycles, each as its files with the first file repeated at the end; one cycle for every import that closes one. */
function findCycles(imports: readonly Import[]): string[][] {
  const next = Map.groupBy(imports, ({ from }) => from);
  const done = new Set<string>();
  const trail: string[] = [];
  const cycles: string[][] = [];
  const visit = (file: string): void => {
    const start = trail.indexOf(file);
    if (start >= 0) cycles.push([...trail.slice(start), file]);
    if (start >= 0 || done.has(file)) return;
    trail.push(file);
    for (const { to } of next.get(file) ?? []) visit(to);
    trail.pop();
    done.add(file);
  };
  for (const file of next.keys()) visit(file);
  return cycles;
}

if (import.meta.main) {
  parseScript(newCommand('npm run imports --', 'check that imports go one way'), ['npm run imports']);
  const violations = checkImports('.', ['shared', 'workers', 'gpu-backend', 'scripts', 'test']);
  for (const { rule, why, what } of violations) console.error(`${rule}: ${what}\n  ${why}`);
  console.log(violations.length === 0 ? 'Every import keeps the rules.' : `${violations.length} broken`);
  process.exitCode = violations.length === 0 ? 0 : 1;
}
