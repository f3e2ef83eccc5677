/** The documents: every link and path leads somewhere, every name of a section is its own, and README stays short. */
import { existsSync, globSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, it, test } from 'vitest';

const DOCUMENTS = [
  ...['README.md', 'ARCHITECTURE.md', 'CONTRIBUTING.md', 'LOG.md'],
  ...readdirSync('docs').flatMap((name) => (name.endsWith('.md') ? [`docs/${name}`] : [])),
];
const README_LINES_MAX = 120;
const FOLDERS = readdirSync('.', { withFileTypes: true }).flatMap((entry) =>
  entry.isDirectory() ? [entry.name] : [],
);

/** Code has brackets and number signs of its own. */
const proseOf = (file: string): string => readFileSync(file, 'utf8').replace(/^ *```.*?^ *```$/gms, '');

/** As code hosts make them of headings: only letters, digits, `-` and `_` stay, spaces become dashes. */
const anchorsOf = (file: string): string[] =>
  [...proseOf(file).matchAll(/^#+ (.+)$/gm)].map(([, heading]) =>
    heading!
      .toLowerCase()
      .replace(/[^\p{L}\p{N} _-]/gu, '')
      .replaceAll(' ', '-'),
  );

/** Targets of `[text](target)` and `[name]: target`; of `[text][name]` and `[name]` those that name nothing. */
function linksOf(file: string): { targets: string[]; undefinedNames: string[] } {
  const prose = proseOf(file).replace(/`[^`]*`/g, '');
  const inline = [...prose.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target]) => target!);
  const named = new Map([...prose.matchAll(/^\[([^\]]+)\]: (\S+)$/gm)].map(([, name, to]) => [name!, to!]));
  const used = [...prose.matchAll(/\[([a-z-]+)\](?![(:[])/g)].map(([, name]) => name!);
  const undefinedNames = used.filter((name) => !named.has(name));
  return { targets: [...inline, ...named.values()], undefinedNames };
}

/** Names in code that begin with a folder of the project, `*` for any name; a folder may end in a slash. */
const pathsOf = (file: string): string[] =>
  [...readFileSync(file, 'utf8').matchAll(/`([^`\n]+)`/g)].flatMap(([, code]) =>
    code!.split(/\s+/).filter((word) => FOLDERS.includes(word.split('/')[0]!) && word.includes('/')),
  );

describe.each(DOCUMENTS)('%s', (file) => {
  it('leads to files and sections that are there', () => {
    const { targets, undefinedNames } = linksOf(file);
    expect(undefinedNames).toEqual([]);
    for (const target of targets.filter((to) => !/^[a-z]+:/.test(to))) {
      const [to, anchor] = target.split('#') as [string, string?];
      const found = to === '' ? file : path.join(path.dirname(file), to);
      expect(existsSync(found), `${target}: no such file`).toBe(true);
      if (anchor !== undefined) expect(anchorsOf(found), `${target}: no such section`).toContain(anchor);
    }
  });

  // LOG.md tells of what was, and of files that are gone.
  it.skipIf(file === 'LOG.md')('names files that are there', () => {
    expect(pathsOf(file).filter((name) => globSync(name).length === 0)).toEqual([]);
  });

  it('gives each section a name of its own', () => {
    const anchors = anchorsOf(file);
    expect(anchors.filter((anchor, i) => anchors.indexOf(anchor) !== i)).toEqual([]);
  });
});

test('README is a screen and a half, and leads to every page of docs', () => {
  const text = readFileSync('README.md', 'utf8');
  expect(text.trimEnd().split('\n').length).toBeLessThanOrEqual(README_LINES_MAX);
  for (const file of DOCUMENTS.slice(1)) expect(text).toContain(`](${file})`);
});

test('docs/operations.md says of each error in the log of the edge what to do', () => {
  const sources = globSync('workers/**/*.ts').map((file) => readFileSync(file, 'utf8'));
  const events = sources.flatMap((text) =>
    [...text.matchAll(/\blog\('error', '(\w+)'/g)].map(([, name]) => name!),
  );
  const firstCells = readFileSync('docs/operations.md', 'utf8')
    .match(/^\| [^|]*/gm)!
    .join();
  expect(events.length).toBeGreaterThan(20);
  expect([...new Set(events)].filter((name) => !firstCells.includes(`\`${name}\``))).toEqual([]);
});

test('commands of wrangler that act on a worker or its database name the environment', () => {
  // Without one they act on the top level of wrangler.toml, which is for one machine.
  const acting = /wrangler (?:deploy|rollback|secret|versions|d1 (?:migrations|time-travel))\b[^`\n]*/g;
  const commands = DOCUMENTS.filter((file) => file.startsWith('docs/')).flatMap(
    (file) => readFileSync(file, 'utf8').match(acting) ?? [],
  );
  expect(commands.length).toBeGreaterThan(8);
  expect(commands.filter((command) => !command.includes('--env '))).toEqual([]);
});
