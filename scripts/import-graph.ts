/**
 * Who imports whom: every source file's imports, read from its syntax tree (static, dynamic, type-only, and
 * `new URL('./x.ts', import.meta.url)`, which is how threads and child processes are named).
 */
import { existsSync, globSync, readFileSync } from 'node:fs';
import { isBuiltin } from 'node:module';
import path from 'node:path';
import { type Expression, parseSync, Visitor } from 'oxc-parser';

export type Import = {
  /** Relative to the root, with forward slashes. */
  readonly from: string;
  /** A file relative to the root, `node:…`, or `npm:` and a package's name. */
  readonly to: string;
  /** False for a relative import of a file that is not there. */
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
      if (isUrl && target?.type === 'Literal' && String(target.value).endsWith('.ts')) add(target);
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

/** The files of one cycle, the first repeated at the end; undefined when there is none. */
export function findCycle(imports: readonly Import[]): string[] | undefined {
  const next = Map.groupBy(imports, ({ from }) => from);
  const done = new Set<string>();
  const trail: string[] = [];
  const visit = (file: string): string[] | undefined => {
    if (done.has(file)) return undefined;
    const start = trail.indexOf(file);
    if (start >= 0) return [...trail.slice(start), file];
    trail.push(file);
    for (const { to } of next.get(file) ?? []) {
      const cycle = visit(to);
      if (cycle !== undefined) return cycle;
    }
    trail.pop();
    done.add(file);
    return undefined;
  };
  for (const file of next.keys()) {
    const cycle = visit(file);
    if (cycle !== undefined) return cycle;
  }
  return undefined;
}
