/**
 * The import rules can fail. For each rule a small tree of files breaks it and only it; a rule without such
 * a tree here fails too, so that none is added unproven.
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { checkImports, RULES } from '../../scripts/import-rules.ts';

/** File → the module that it imports. */
type Tree = Record<string, string>;

const BREAKING: Record<string, Tree> = {
  'shared-is-pure': { 'shared/a.ts': '../workers/b.ts' },
  'shared-has-no-io': { 'shared/a.ts': 'node:fs' },
  'workers-know-no-backend': { 'workers/a.ts': '../gpu-backend/b.ts' },
  'backend-knows-no-workers': { 'gpu-backend/a.ts': '../workers/b.ts' },
  'one-file-imports-onnxruntime': { 'gpu-backend/onnx/other.ts': 'onnxruntime-node' },
  'only-db-knows-columns': { 'workers/requests/a.ts': '../db/schema.ts' },
  'engine-below-api': { 'gpu-backend/engine/a.ts': '../api/b.ts' },
  'offline-data-first': { 'gpu-backend/learning/data/a.ts': '../gates/b.ts' },
  'offline-masks-second': { 'gpu-backend/learning/gates/a.ts': '../evaluation/b.ts' },
  'offline-evaluation-third': { 'gpu-backend/learning/evaluation/a.ts': '../../publication/b.ts' },
  'steps-know-no-search': { 'gpu-backend/learning/gates/a.ts': '../search/b.ts' },
  'serving-needs-no-learning': { 'gpu-backend/api/a.ts': '../learning/data/b.ts' },
  'only-jobs-publish': { 'gpu-backend/api/a.ts': '../publication/b.ts' },
  'graphs-know-no-server': { 'gpu-backend/onnx/a.ts': '../engine/b.ts' },
  'wiring-at-entry-points': { 'gpu-backend/api/a.ts': '../cli/b.ts' },
  'edge-order-base': { 'workers/base/a.ts': '../db/b.ts' },
  'edge-order-db': { 'workers/db/a.ts': '../routing/b.ts' },
  'edge-order-backends': { 'workers/backends/a.ts': '../tenants/b.ts' },
  'edge-order-tenants': { 'workers/tenants/a.ts': '../routing/b.ts' },
  'edge-order-routing': { 'workers/routing/a.ts': '../requests/b.ts' },
  'edge-order-releases': { 'workers/releases/a.ts': '../counting/b.ts' },
  'edge-order-counting': { 'workers/counting/a.ts': '../requests/b.ts' },
  'edge-order-http': { 'workers/http/a.ts': '../admin/b.ts' },
  'edge-order-requests': { 'workers/requests/a.ts': '../admin/b.ts' },
  'edge-services-wire-subjects': { 'workers/routing/a.ts': '../services.ts' },
  'edge-is-composed-once': { 'workers/http/a.ts': '../app.ts' },
  'dashboard-is-a-client': { 'workers/dashboard/a.tsx': '../routing/b.ts' },
  'edge-serves-the-page-unread': { 'workers/http/a.ts': '../dashboard/b.ts' },
  'no-test-code-in-the-product': { 'gpu-backend/api/a.ts': '../../scripts/b.ts' },
};

/** What may be imported, as the real tree does it. */
const KEEPING: Tree = {
  'shared/mask/mask.ts': '@noble/hashes/sha2.js',
  'workers/requests/a.ts': '../routing/b.ts',
  'workers/routing/b.ts': '../db/queries.ts',
  'workers/db/queries.ts': './schema.ts',
  'gpu-backend/api/a.ts': '../engine/c.ts',
  'gpu-backend/engine/c.ts': '../onnx/session.ts',
  'gpu-backend/onnx/session.ts': 'onnxruntime-node',
  'gpu-backend/cli/d.ts': '../api/a.ts',
  'gpu-backend/publication/e.ts': '../learning/data/f.ts',
};

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'import-rules-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

const plain = (module: string) => `import '${module}';`;
/** Every way in which one file names another. */
const WAYS: Record<string, (module: string) => string> = {
  'import type': (module) => `import type { T } from '${module}';`,
  'export from': (module) => `export { a } from '${module}';`,
  'export all': (module) => `export * from '${module}';`,
  'dynamic import': (module) => `await import('${module}');`,
  'type of an import': (module) => `type T = import('${module}').T;`,
  'a thread': (module) => `new Worker(new URL('${module}', import.meta.url));`,
  'after `using`': (module) => `await using a = open(); const b = await import('${module}');`,
};

function brokenRules(tree: Tree, statement = plain): string[] {
  const write = (file: string, text: string) => {
    mkdirSync(path.dirname(path.join(folder, file)), { recursive: true });
    writeFileSync(path.join(folder, file), text);
  };
  for (const [file, imported] of Object.entries(tree)) {
    // The imported file exists first, so that a tree breaks no rule but its own; a tree's own text wins.
    const target = path.join(path.dirname(file), imported);
    if (imported.startsWith('.') && !(target in tree) && !imported.includes('nowhere'))
      write(target, 'export {};');
  }
  for (const [file, imported] of Object.entries(tree)) write(file, statement(imported));
  const folders = [...new Set(Object.keys(tree).map((file) => file.split('/')[0]!))];
  return [...new Set(checkImports(folder, folders).map((violation) => violation.rule))];
}

describe('each import rule can fail', () => {
  test('every rule has a tree that breaks it', () => {
    expect(Object.keys(BREAKING).sort()).toEqual(RULES.map((rule) => rule.name).sort());
  });

  test.each(Object.entries(BREAKING))('%s', (name, tree) => {
    expect(brokenRules(tree)).toEqual([name]);
  });

  test.each([
    'api/a.ts',
    'jobs/a.ts',
    'engine/a.ts',
    'grammar/a.ts',
    'encoder/a.ts',
    'onnx/a.ts',
    'model/a.ts',
  ])('gpu-backend/%s answers requests, so it needs no learning', (file) => {
    const tree = { [`gpu-backend/${file}`]: '../learning/data/b.ts' };
    expect(brokenRules(tree)).toEqual(['serving-needs-no-learning']);
  });

  test('what wires a backend needs no learning', () => {
    expect(brokenRules({ 'gpu-backend/main.ts': './learning/data/b.ts' })).toEqual([
      'serving-needs-no-learning',
    ]);
  });

  test('a grammar knows no server', () => {
    expect(brokenRules({ 'gpu-backend/grammar/a.ts': '../api/b.ts' })).toEqual(['engine-below-api']);
  });

  test('onnxruntime is refused in tests and scripts too', () => {
    expect(brokenRules({ 'test/a.ts': 'onnxruntime-node' })).toEqual(['one-file-imports-onnxruntime']);
  });

  test.each(Object.entries(WAYS))('%s counts', (_name, statement) => {
    expect(brokenRules({ 'gpu-backend/a.ts': '../workers/b.ts' }, statement)).toEqual([
      'backend-knows-no-workers',
    ]);
  });

  test('cycles, long ones and of types alone too', () => {
    const tree = { 'shared/a.ts': './b.ts', 'shared/b.ts': './c.ts', 'shared/c.ts': './b.ts' };
    expect(brokenRules(tree)).toEqual(['no-cycles']);
    expect(brokenRules(tree, WAYS['import type'])).toEqual(['no-cycles']);
    expect(brokenRules({ 'shared/a.ts': './a.ts' })).toEqual(['no-cycles']);
    // All of them, for the first may hide worse ones.
    brokenRules({ ...tree, 'shared/z.ts': './z.ts' });
    expect(checkImports(folder, ['shared'])).toHaveLength(2);
  });

  test('a file that is not there', () => {
    expect(brokenRules({ 'shared/a.ts': './nowhere.ts' })).toEqual(['resolvable']);
    // A file beside this one, as `new URL` may name it.
    expect(brokenRules({ 'gpu-backend/a.ts': 'nowhere.ts' }, WAYS['a thread'])).toEqual(['resolvable']);
  });

  test('a file that does not parse is refused', () => {
    expect(() => brokenRules({ 'shared/a.ts': './b.ts' }, () => 'import {')).toThrow(/shared\/a.ts/);
  });

  test('what the product does is allowed', () => {
    expect(brokenRules(KEEPING)).toEqual([]);
  });
});
