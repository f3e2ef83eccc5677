/** The command line as a person meets it: one clear line when something is wrong, and help with examples. */
import { fork, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Command } from 'commander';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { program } from '../../../gpu-backend/cli/cli.ts';
import manifest from '../../../package.json' with { type: 'json' };
import { eventually } from '../api/harness.ts';
import { saidInProcess } from './in-process.ts';

const home = mkdtempSync(path.join(tmpdir(), 'cli-'));
afterAll(() => rmSync(home, { recursive: true }));
const ENVIRONMENT = { MASKROUTE_HOME: home, MASKROUTE_ADMIN_KEY: '', MASKROUTE_BACKEND_KEY: '' };

/** As a person runs it. */
function maskroute(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, ['bin/maskroute.js', ...args], {
    env: { ...process.env, ...ENVIRONMENT },
    encoding: 'utf8',
  });
  return { status, stdout, stderr };
}

/** The same without a process of its own. */
const said = (...args: string[]) => saidInProcess(ENVIRONMENT, args);

const PRESET = 'gpu-backend/presets/smollm2-135m-instruct/mask-set.json';
const MODEL = ['--model', 'nobody'];
const LEARN = ['learn', ...MODEL, '--data', 'x', '--out', path.join(home, 'out')];
const EVALUATE = ['evaluate', ...MODEL, '--mask-set', 'x', '--data', 'x'];
const REFUSED: [string, string[], RegExp][] = [
  ['an unknown device', ['serve', ...MODEL, '--device', 'cuda'], /Allowed choices are cpu, webgpu, auto/],
  ['a switch', ['serve', ...MODEL, '--prompt-lookup', 'yes'], /Allowed choices are on, off/],
  ['an unknown command', ['nonsense'], /unknown command 'nonsense'/],
  ['help of an unknown command', ['help', 'nonsense'], /unknown command 'nonsense'/],
  ['help of an unknown command of a group', ['model', 'help', 'nonsense'], /unknown command 'nonsense'/],
  ['help that begins with the group', ['help', 'model', 'nonsense'], /unknown command 'nonsense'/],
  [
    'a table that cannot be written anywhere',
    [
      ...['distill', '--encoder', 'all-minilm-l6-v2', '--out', '/proc/nowhere/table.bin'],
      ...['--data', 'gpu-backend/learning/data/passages.jsonl'],
    ],
    /nowhere cannot be made/,
  ],
  [
    'a table where a folder is',
    [
      ...['distill', '--encoder', 'all-minilm-l6-v2', '--out', home],
      ...['--data', 'gpu-backend/learning/data/passages.jsonl'],
    ],
    /is a folder, not a regular file/,
  ],
  ['an unknown option', ['model', 'list', '--nonsense'], /unknown option '--nonsense'/],
  ['too many arguments', ['model', 'list', 'more'], /too many arguments/],
  ['a missing option', ['serve'], /required option '--model <name>'/],
  [
    'an unknown kind of weights',
    ['model', 'pull', 'x', '--weights', 'q5'],
    /Allowed choices are q8, q4, q8-columns, f32/,
  ],
  ['a model that is not installed', ['model', 'show', 'nobody'], /No model named "nobody"/],
  ['a source that is nowhere', ['model', 'pull', 'no/such/file.gguf'], /no\/such\/file.gguf/],
  ['no backend key', ['serve', ...MODEL], /MASKROUTE_BACKEND_KEY/],
  [
    'a mask set that is missing',
    ['publish', 'no/such.json'],
    /no\/such.json cannot be read: there is no such file/,
  ],
  [
    'an evaluation that is none',
    ['publish', PRESET, '--evaluation', PRESET],
    /mask-set.json: rows: it is missing, expected a list/,
  ],
  ['no edge', ['rollback'], /Name the edge with --edge/],
  ['an edge that is no URL', ['rollback', '--edge', 'nonsense'], /--edge must be .* not "nonsense"/],
  ['an edge without http', ['status', '--edge', 'localhost:9'], /--edge must be .* not "localhost:9"/],
  ['a backend without http', ['schedule', 'list', '--backend', 'here:9'], /--backend must be .* "here:9"/],
  [
    'backends without http',
    ['register', '--count', '2', '--url', 'https://backend-{n}.test', '--probe', 'backend-{n}:8080'],
    /--probe must be .* "backend-\{n\}:8080"/,
  ],
  [
    'a rank beside a table, which has one',
    ['surrogates', ...MODEL, '--data', 'x', '--out', 'x', '--from', 'x', '--rank', '64'],
    /'--from <file>' cannot be used with option '--rank <number>'/,
  ],
  ['no admin key', ['rollback', '--edge', 'http://localhost:9'], /Set MASKROUTE_ADMIN_KEY/],
  ['a sparsity of all', [...LEARN, '--clusters', '2', '--sparsity', '1'], /--sparsity.*between 0 and 1/],
  ['a sparsity of nothing', [...LEARN, '--clusters', '2', '--sparsity', '0'], /--sparsity.*between 0 and 1/],
  [
    'counts of clusters that are none',
    [...LEARN, '--clusters', '2,', '--sparsity', '0.1'],
    /1,2,4,8, or auto/,
  ],
  ['no clusters', [...LEARN, '--clusters', '0', '--sparsity', '0.1'], /--clusters.*from 1 to 256/],
  [
    'a memory of nothing',
    [...LEARN, '--clusters', '2', '--sparsity', '0.1', '--memory', '0'],
    /--memory.*gigabytes, such as 8/,
  ],
  ['a model to learn for that is missing', [...LEARN, '--clusters', '2', '--sparsity', '0.1'], /"nobody"/],
  [
    'a queue that is no address',
    [...LEARN, '--clusters', '2', '--sparsity', '0.1', '--queue', 'http://here'],
    /--queue.*redis:\/\/host:6379/,
  ],
  [
    'a journal without a queue',
    [...LEARN, '--clusters', '2', '--sparsity', '0.1', '--journal', 'here'],
    /--journal is for --queue/,
  ],
  ['work without a queue', ['work'], /required option '--queue <url>'/],
  ['a schedule without a backend', ['schedule', 'list'], /Name the backend with --backend/],
  [
    'a schedule without a key',
    ['schedule', 'list', '--backend', 'http://localhost:9'],
    /MASKROUTE_BACKEND_KEY/,
  ],
  [
    'a schedule at an edge without a backend',
    ['schedule', 'list', '--edge', 'http://localhost:9'],
    /--edge needs --on/,
  ],
  [
    'a schedule at a backend that is named twice',
    ['schedule', 'list', '--on', 'a', '--backend', 'http://localhost:9'],
    /give one of them/,
  ],
  [
    'a schedule of what is no job',
    ['schedule', 'add', 'README.md', '--every', '24h', '--backend', 'http://localhost:9'],
    /README.md has no job/,
  ],
  [
    'a schedule of a file that is missing',
    ['schedule', 'add', 'no/such.json', '--every', '24h', '--backend', 'http://localhost:9'],
    /no\/such.json cannot be read: there is no such file/,
  ],
  [
    'a schedule of a folder',
    ['schedule', 'add', 'docs', '--every', '24h', '--backend', 'http://localhost:9'],
    /docs is a folder, not a regular file/,
  ],
  [
    'an error rate of all',
    ['publish', PRESET, '--activate', '--max-error-rate', '1'],
    /--max-error-rate.*at least 0 and below 1/,
  ],
  [
    'a slowdown that is a speedup',
    ['publish', PRESET, '--activate', '--max-slowdown', '0.9'],
    /--max-slowdown.*a number above 1/,
  ],
  ['facts that nothing asks for', [...EVALUATE, '--facts', 'x'], /--facts needs --checks/],
  ['a limit of tasks without any', [...EVALUATE, '--task-limit', '9'], /--task-limit needs --tasks/],
  [
    'a sparsity for no baseline',
    [...EVALUATE, '--baselines', 'one-mask', '--sparsity', '0.5'],
    /--sparsity is for the baselines shortgpt,.*none of them/,
  ],
  [
    'a budget for no search',
    [...EVALUATE, '--baselines', 'last-k', '--budget', '9'],
    /--budget is for the baselines sleb, blockpruner, finercut/,
  ],
  [
    'positions for no search',
    [...EVALUATE, '--baselines', 'none', '--search-positions', '99'],
    /--search-positions is for the baselines sleb/,
  ],
  ['a count that is none', ['bench', 'route', '--requests', '-5'], /whole number above 0/],
  ['a rank that is none', ['bench', 'ranks', '--data', 'x', '--ranks', '64,65'], /multiple of 32/],
];

/** Called rightly, and yet it cannot be done: exit code 1. Everything else above is not called rightly: 2. */
const FAILED = [
  'a model that is not installed',
  'a source that is nowhere',
  'a model to learn for that is missing',
  'a table that cannot be written anywhere',
];

const commandsOf = (command: Command, name: string): [string, Command][] => [
  [name, command],
  ...command.commands.flatMap((sub) => commandsOf(sub, `${name} ${sub.name()}`)),
];

function helpOf(command: Command): string {
  let help = '';
  const output = command.configureOutput();
  command.configureOutput({ ...output, writeOut: (text) => (help += text) });
  command.outputHelp();
  command.configureOutput(output);
  return help;
}

/** A line that goes on in the next one is one example. */
const examplesIn = (help: string): string[] =>
  help
    .split(/\nExamples?:\n/)[1]!
    .replaceAll(/\\\n\s*/g, '')
    .split('\n')
    .map((line) => line.replace(/ +#.*$/, '').trim())
    .filter((line) => line !== '');

/** The command that an example calls, and what it gives it. */
function calledBy(line: string): [Command, string[]] {
  const words = line
    .slice(line.indexOf('maskroute '))
    .replace(/[)>].*$/, '')
    .trim()
    .split(' ')
    .slice(1);
  let command = program as Command;
  for (;;) {
    const next = command.commands.find((sub) => sub.name() === words[0]);
    if (next === undefined) return [command, words];
    command = next;
    words.shift();
  }
}

/** What people of the field do not say, and what they say. */
const FIELD_WORDS: readonly (readonly [RegExp, string])[] = [
  [/milliseconds a token|ms a token|tpot/i, 'ms/token'],
  [/tokens a second/i, 'tokens/s'],
  [/stand-ins?\b/i, 'surrogates'],
  [/leave out blocks|blocks (to leave )?out/i, 'blocks to skip'],
  [/graphics device/i, 'GPU'],
  [/what comes again/i, 'schedules'],
];

describe('the command line', () => {
  test.each(REFUSED)('refuses %s', async (what, args, reason) => {
    const { status, stdout, stderr } = await said(...args);
    expect(stderr).toMatch(reason);
    expect(stderr).toMatch(/^error: /);
    expect(stderr.trim().split('\n').length, stderr).toBeLessThanOrEqual(2);
    expect([status, stdout]).toEqual([FAILED.includes(what) ? 1 : 2, '']);
  });

  test.each([
    ['MASKROUTE_CACHE_TOKENS', '0', 'tokens above 0, not "0"'],
    ['MASKROUTE_PREFIX_TOKENS', '1.5', 'tokens, not "1.5"'],
  ])('refuses a %s of %s, by its name', async (name, value, reason) => {
    vi.stubEnv(name, value);
    const { status, stderr } = await said('serve', ...MODEL);
    expect([status, stderr]).toEqual([2, `error: ${name} must be a whole number of ${reason}.\n`]);
  });

  test('says so and ends with 1 or 2, as a process', () => {
    const { status, stdout, stderr } = maskroute('model', 'show', 'nobody');
    expect([status, stdout]).toEqual([1, '']);
    expect(stderr).toMatch(/^error: No model named "nobody".*\n$/);
    expect(maskroute('nonsense').status).toBe(2);
  });

  test('tells its version', () => {
    expect(maskroute('--version')).toEqual({ status: 0, stdout: `${manifest.version}\n`, stderr: '' });
  });

  describe.each(commandsOf(program, 'maskroute'))('%s', (name, command) => {
    const words = name.split(' ').slice(1);

    test('says what it does, what each argument and option is, and each default once', () => {
      const help = helpOf(command);
      expect(command.description()).not.toBe('');
      for (const { description, long } of command.options) expect(description, long).not.toBe('');
      for (const argument of command.registeredArguments) {
        expect(argument.description, argument.name()).not.toBe('');
      }
      const descriptions = command.options.map((option) => command.createHelp().optionDescription(option));
      for (const text of descriptions) expect(text.match(/default: /g)?.length ?? 0, text).toBeLessThan(2);
      expect(help).not.toMatch(/default: (false|\[\]|"|undefined)/);
      for (const [word, wanted] of FIELD_WORDS) expect(help, `say ${wanted}`).not.toMatch(word);
    });

    test('ends its help with examples that it takes', () => {
      const examples = examplesIn(helpOf(command)).filter((line) => line.includes(name));
      expect(examples.length).toBeGreaterThan(0);
      for (const line of examples) {
        const [called, args] = calledBy(line);
        const given = args.filter((arg) => arg.startsWith('--'));
        const known = ['--help', ...called.options.map(({ long }) => long)];
        for (const option of given) expect(known, line).toContain(option);
        const needed = called.options.filter(({ mandatory, envVar }) => mandatory && envVar === undefined);
        if (given.includes('--help')) continue;
        for (const { long } of needed) expect(given, line).toContain(long);
        const operands = args.findIndex((arg) => arg.startsWith('--'));
        const count = called.registeredArguments.filter(({ required }) => required).length;
        if (called.commands.length === 0) expect(operands < 0 ? args.length : operands, line).toBe(count);
      }
    });

    test('refuses an option that it does not have, with exit code 2', async () => {
      const { status, stdout, stderr } = await said(...words, '--no-such-option');
      // What must be given is missed first.
      expect(stderr).toMatch(
        /^error: (unknown option '--no-such-option'|required option .* not specified)\n\(run with --help for the options\)\n$/,
      );
      expect([status, stdout]).toEqual([2, '']);
    });

    // `serve` writes a log and `completion` a script.
    const prints = command.commands.length === 0 && !['serve', 'completion'].includes(command.name());
    if (prints) {
      test('prints JSON where a program asks', () => {
        expect(command.options.map(({ long }) => long)).toContain('--json');
      });
    }
  });

  test('a shell completes commands and options, the ones that fit', async () => {
    const { stdout: script } = await said('completion', 'bash');
    const offered = (...typed: string[]) => {
      const words = ['maskroute', ...typed].map((word) => `'${word}'`).join(' ');
      const asked = `${script}\nCOMP_WORDS=(${words}); COMP_CWORD=${typed.length}; _maskroute; echo "\${COMPREPLY[@]}"`;
      return spawnSync('bash', ['-c', asked], { encoding: 'utf8' }).stdout.trim().split(' ');
    };
    expect(offered('ro')).toEqual(['rollback']);
    expect(offered('model', '')).toEqual(['pull', 'list', 'surrogates', 'show', 'help', '--help']);
    expect(offered('model', 'show', '--v')).toEqual(['--verify']);
    expect(offered('learn', '--data', 'file.jsonl', '--spa')).toEqual(['--sparsity']);
    expect(offered('completion', 'z')).toEqual(['zsh']);
    expect((await said('completion', 'zsh')).stdout).toContain('bashcompinit');
    expect((await said('completion', 'fish')).stdout).toContain(
      "complete -c maskroute -n '__fish_seen_subcommand_from model; and __fish_seen_subcommand_from show' -l verify",
    );
    expect((await said('completion', 'tcsh')).status).toBe(2);
  });

  test.each([[['help', 'model', 'pull']], [['model', 'help', 'pull']]])(
    '%j is the help of pull',
    async (args) => {
      expect(await said(...args)).toMatchObject({
        status: 0,
        stdout: expect.stringMatching(/^Usage: maskroute model pull/),
      });
    },
  );

  test('tells of every command', async () => {
    const { status, stdout } = await said('--help');
    expect(status).toBe(0);
    const commands = [
      'model',
      'learn',
      'surrogates',
      'evaluate',
      'distill',
      'publish',
      'rollback',
      'status',
      'history',
      'serve',
      'bench',
      'completion',
    ];
    for (const command of commands) {
      expect(stdout).toMatch(new RegExp(`^ {2}${command} `, 'm'));
    }
  });

  test('answers in JSON where a program asks', async () => {
    expect(JSON.parse((await said('model', 'list', '--json')).stdout)).toEqual([]);
  });

  test('does not take a file from a killed run for a running edge’s key', async () => {
    const dev = { edge: 'http://localhost:9', backend: 'http://localhost:9', model: 'm' };
    const keys = { apiKey: 'a', adminKey: 'b', backendKey: 'c' };
    writeFileSync(path.join(home, 'dev.json'), JSON.stringify({ ...dev, ...keys }));
    expect((await said('rollback')).stderr).toMatch(
      /^error: No edge answers at http:\/\/localhost:9: .+\.\n$/,
    );
    expect((await said('rollback', '--edge', 'http://localhost:8')).stderr).toMatch(
      /Set MASKROUTE_ADMIN_KEY/,
    );
  });

  test('refuses what cannot be a key, without showing it', async () => {
    const env = { ...ENVIRONMENT, MASKROUTE_ADMIN_KEY: 'of two\nlines' };
    const { stderr } = await saidInProcess(env, ['rollback', '--edge', 'http://localhost:9']);
    expect(stderr).toMatch(/^error: MASKROUTE_ADMIN_KEY is no key: .+\.\n$/);
  });
});

test('a reader that has left, such as head, ends the command without a word', () => {
  const command = `"${process.execPath}" bin/maskroute.js learn --help | true`;
  expect(spawnSync('sh', ['-c', command], { encoding: 'utf8' })).toMatchObject({ stdout: '', stderr: '' });
});

test.skipIf(process.platform !== 'linux').each([
  ['of a command', 'bin/maskroute.js completion bash'],
  ['of help', 'bin/maskroute.js learn --help'],
])('a full disk takes no output %s, which is one line of what is wrong', (_, words) => {
  const command = `exec "${process.execPath}" ${words} > /dev/full`;
  const { status, stderr } = spawnSync('sh', ['-c', command], { encoding: 'utf8' });
  expect(stderr).toMatch(/^error: ENOSPC: [^\n]*\n$/);
  expect(status).toBe(1);
});

test.skipIf(process.platform !== 'linux')('a full disk that takes no progress ends no work', () => {
  const work = `await import('./gpu-backend/cli/cli.ts');
    process.stderr.write('half of it');
    setTimeout(() => console.log('all of it'), 50);`;
  const command = `exec "${process.execPath}" --input-type=module -e "${work}" 2> /dev/full`;
  expect(spawnSync('sh', ['-c', command], { encoding: 'utf8' })).toMatchObject({
    status: 0,
    stdout: 'all of it\n',
  });
});

test('a command ends with its work although its parent has a channel, and a program that listens to its own goes on', async () => {
  const entry = path.join(home, 'program.mjs');
  const terminal = new URL('../../../gpu-backend/cli/terminal.ts', import.meta.url).href;
  writeFileSync(
    entry,
    `const { interruptible } = await import(${JSON.stringify(terminal)});
    if (process.argv[2] === 'listens') process.on('message', () => process.exit(7));
    await interruptible(async () => {});
    // It is sent only if something else keeps the process alive.
    setTimeout(() => process.send('over'), 20).unref();`,
  );
  const [command, program] = [fork(entry), fork(entry, ['listens'])];
  program.once('message', () => program.send('end'));
  const ends = [command, program].map((child) => once(child, 'exit'));
  expect(await Promise.all(ends)).toEqual([
    [0, null],
    [7, null],
  ]);
});

/** Prints at the end which of Node's own modules for TypeScript was loaded. */
const COMPILERS =
  'data:text/javascript,process.on("exit",()=>console.log(process.moduleLoadList.filter((name)=>name.includes("amaro"))))';

test('a second start finds all sources compiled, and loads no compiler', () => {
  const env = { ...process.env };
  // Would turn the cache on before the first file.
  delete env.NODE_COMPILE_CACHE;
  const start = () =>
    spawnSync(process.execPath, ['--import', COMPILERS, 'bin/maskroute.js', '--version'], {
      env,
      encoding: 'utf8',
    }).stdout;
  start();
  expect(start()).toBe(`${manifest.version}\n[]\n`);
});

const OLDER_NODE =
  'data:text/javascript,Object.defineProperty(process,"versions",{value:{...process.versions,node:"20.0.0"}})';

/** Each passes on the Ctrl-C that the terminal sends to the command as well. */
test.skipIf(process.platform !== 'linux').each([
  ['npm', ['npm', 'run', 'maskroute', '--']],
  ['an older Node', [process.execPath, '--import', OLDER_NODE, 'bin/maskroute.js']],
])('under %s a Ctrl-C in the terminal stops a command in good order', async (_, begin) => {
  const work = ['work', '--queue', 'redis://127.0.0.1:9', '--journal', path.join(home, 'units')];
  const words = [...begin, ...work];
  // It gives its command a terminal, through a shell that would say 130 itself.
  const command = `exec ${words.map((word) => `'${word}'`).join(' ')}`;
  const terminal = spawn('script', ['-qec', command, '/dev/null'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  let said = '';
  terminal.stdout.on('data', (text) => {
    said += text;
  });
  await eventually(() => said.includes('This worker waits for a run.'));
  terminal.stdin.write('\x03');
  const [status] = await once(terminal, 'close');
  expect(status, said).toBe(0);
});
