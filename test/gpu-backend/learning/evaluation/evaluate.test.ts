/** A whole evaluation on the small model: what it says, and that it goes on where it was cut off. */
import { spawnSync } from 'node:child_process';
import {
  appendFileSync,
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openEncoder } from '../../../../gpu-backend/learning/data/encoders.ts';
import { evaluate } from '../../../../gpu-backend/learning/evaluation/evaluate.ts';
import type { EvaluateOptions } from '../../../../gpu-backend/learning/evaluation/evaluation-context.ts';
import { surrogatesOf } from '../../../../gpu-backend/learning/evaluation/evaluation-context.ts';
import type { Evaluation } from '../../../../gpu-backend/learning/evaluation/result.ts';
import { BASELINES, evaluationSchema, METHODS } from '../../../../gpu-backend/learning/evaluation/result.ts';
import { reportHtml } from '../../../../gpu-backend/learning/report/write-report.ts';
import { installSurrogates, writeSurrogates } from '../../../../gpu-backend/model/surrogates.ts';
import type { ModelHash } from '../../../../shared/mask/mask.ts';
import { denseMask, maskBits, maskFromSkippedLayers, maskId } from '../../../../shared/mask/mask.ts';
import { type MaskSet, maskSetSchema } from '../../../../shared/mask/mask-set.ts';
import { testHome } from '../../../support/installed-model.ts';
import { randomSurrogates } from '../../../support/random-llama.ts';
import { saidInProcess } from '../../cli/in-process.ts';
import { writeSmallData } from '../small-run.ts';
import { type TinyHome, tinyHome } from './tiny.ts';

let tiny: TinyHome;
let data: string[];
let set: MaskSet;
const encoderOptions = { home: testHome, threads: 1, hooks: { onProgress: () => {}, log: () => {} } };
const MASKS = [
  { skipAttention: [1], skipFfn: [2] },
  { skipAttention: [3], skipFfn: [1] },
];

beforeAll(async () => {
  tiny = await tinyHome();
  data = await writeSmallData(join(tiny.home, 'data'));
  set = await smallSet();
  writeFileSync(join(tiny.home, 'set.json'), JSON.stringify(set));
});
afterAll(() => tiny[Symbol.dispose]());

/** Two clusters around one prompt of each kind. */
async function smallSet(): Promise<MaskSet> {
  const { encoder, close } = await openEncoder('static', encoderOptions);
  const vectors = await encoder.embed(['How many apples does Tom have?', 'Book me a flight to Rome.']);
  await close();
  const hash = tiny.model.manifest.hash as ModelHash;
  return maskSetSchema.parse({
    format: 'maskroute-mask-set-v1',
    name: 'small',
    targetSparsity: 0.25,
    reachedSparsity: 0.25,
    model: { name: 'tiny', hash, blockCount: 8 },
    encoder: encoder.spec,
    clusters: MASKS.map((layers, i) => {
      const mask = maskFromSkippedLayers(8, layers);
      return { centroid: [...vectors[i]!], bits: maskBits(mask), mask: maskId(hash, mask), share: 0.5 };
    }),
    surrogate: false,
    learned: { method: 'by hand', oneMask: maskBits(maskFromSkippedLayers(8, MASKS[0]!)) },
    heldOut: {},
    createdAt: '2026-01-01T00:00:00.000Z',
  });
}

type Changes = Partial<Omit<EvaluateOptions, 'evaluated' | 'compared' | 'rows'>> & {
  readonly [Group in 'evaluated' | 'compared' | 'rows']?: Partial<EvaluateOptions[Group]>;
};
const options = ({ evaluated, compared, rows, ...others }: Changes = {}): EvaluateOptions => ({
  evaluated: { home: tiny.home, model: tiny.model, threads: 1, ...evaluated },
  compared: {
    maskSets: [set],
    openEncoder: () => openEncoder('static', encoderOptions),
    baselines: BASELINES,
    sparsities: [0.5],
    flavours: [null],
    ...compared,
  },
  rows: { data, calibration: [], limit: 6, tokensMax: 60, seed: 1, ...rows },
  search: { evaluationsMax: 20, positions: 60 },
  timing: { rounds: 1, equalTime: true },
  onProgress: () => {},
  onRows: () => {},
  ...others,
});
const equalCount = { timing: { rounds: 1, equalTime: false } };
const withoutFacts = { facts: [], longTokens: 300 };

/** All but the times, which are never equal twice. */
const figures = ({ rows }: Evaluation) =>
  rows.map(({ msPerToken: _ms, msPerTokenSpread: _spread, ...row }) => row);

describe('evaluate', () => {
  it('has one row a method and sparsity, and routes as the edge does', async () => {
    const found = await evaluate(options());
    expect(evaluationSchema.parse(JSON.parse(JSON.stringify(found)))).toEqual(found);
    expect([...new Set(found.rows.map(({ method }) => method))]).toEqual(METHODS);
    for (const row of found.rows) {
      expect(row.rows).toBe(6);
      expect(row.msPerToken).toBeGreaterThan(0);
      expect(row.kl >= 0 && row.agreement <= 1 && row.perplexity > 1).toBe(true);
      if (row.method !== 'dense') expect(row.kl).toBeGreaterThan(0);
    }
    expect(found.rows[0]).toMatchObject({ method: 'dense', kl: 0, agreement: 1, attention: 0, ffn: 0 });
    expect(found.rows[1]).toMatchObject({
      method: 'learned',
      clusters: 2,
      sparsity: 0.25,
      attention: 1,
      ffn: 1,
    });
    const [{ kinds }] = found.routing as [Evaluation['routing'][number]];
    expect(kinds).toEqual([
      { kind: 'sums', counts: [3, 0] },
      { kind: 'trips', counts: [0, 3] },
    ]);
    const [headroom] = found.headroom as [Evaluation['headroom'][number]];
    const klOf = (method: string) => found.rows.find((row) => row.method === method)!.kl;
    expect(headroom).toMatchObject({ name: 'small', surrogate: false, masks: 2, rows: 6, blocks: null });
    expect(headroom.routed.kl).toBeCloseTo(klOf('learned'), 9);
    expect(headroom.oneMask.kl).toBeCloseTo(klOf('one-mask'), 9);
    expect(headroom.bestAfterwards.kl).toBeLessThanOrEqual(headroom.routed.kl + 1e-12);
    expect(headroom.bestAfterwards.kl).toBeLessThanOrEqual(headroom.byKind.kl + 1e-12);
    expect(headroom.bestAfterwards.kl).toBeLessThanOrEqual(headroom.bestByOtherHalf.kl + 1e-12);
    const at = (method: string, target: number) =>
      found.rows.find((row) => row.method === method && row.targetSparsity === target)!;
    expect([at('sleb', 0.5).attention, at('sleb', 0.5).ffn]).toEqual([2, 2]);
    expect([at('llm-drop', 0.5).attention, at('llm-drop', 0.5).ffn]).toEqual([4, 0]);
    expect(at('finercut', 0.25).kl).toBeLessThan(at('llm-drop', 0.5).kl);
  }, 60_000);

  it('says in blocks what routing gains where the set has its one mask with fewer out', async () => {
    const lighterMasks = [{ skipAttention: [1], skipFfn: [] }].map((layers) =>
      maskBits(maskFromSkippedLayers(8, layers)),
    );
    const withSteps = { ...set, learned: { ...set.learned, lighterMasks } };
    const headroomOf = async (maskSet: MaskSet) => {
      const compared = { baselines: ['one-mask'] as const, maskSets: [maskSet] };
      return (await evaluate(options({ ...equalCount, compared }))).headroom;
    };
    expect((await headroomOf(withSteps))[0]!.blocks).not.toBeNull();
    const odd = { ...set, learned: { ...set.learned, lighterMasks: ['ffff', 3] } };
    expect((await headroomOf(odd))[0]!.blocks).toBeNull();
    // A set made by hand: nothing is out for everybody.
    const light = { ...set, learned: { ...set.learned, oneMask: maskBits(denseMask(8)) } };
    expect(await headroomOf(light)).toEqual([]);
    // Clusters that share one mask route nobody.
    const [first] = set.clusters;
    const clusters = set.clusters.map(({ centroid }) => ({ ...first!, centroid }));
    expect(await headroomOf({ ...set, clusters })).toEqual([]);
  }, 60_000);

  it('computes nothing twice, whatever a kill left in its files', async () => {
    const home = join(tiny.home, 'again');
    mkdirSync(home);
    const whole = await evaluate(options({ ...equalCount, evaluated: { home } }));
    const folder = join(home, 'evaluations');
    const sizes = () => readdirSync(folder).map((file) => readFileSync(join(folder, file)).length);
    const before = sizes();
    expect(figures(await evaluate(options({ ...equalCount, evaluated: { home } })))).toEqual(figures(whole));
    expect(sizes()).toEqual(before);
    // Half of one file is gone, another ends in the middle of a line.
    const [first, second] = readdirSync(folder).map((file) => join(folder, file));
    const lines = readFileSync(first!, 'utf8').split('\n');
    writeFileSync(first!, lines.slice(0, lines.length >> 1).join('\n'));
    appendFileSync(second!, '["m_0000');
    expect(figures(await evaluate(options({ ...equalCount, evaluated: { home } })))).toEqual(figures(whole));
    rmSync(home, { recursive: true });
  }, 60_000);

  it('stopped at any moment goes on to the same figures', async () => {
    const home = join(tiny.home, 'stopped');
    const whole = await evaluate(options(equalCount));
    for (const steps of [3, 17, 40, 200]) {
      const stop = new AbortController();
      let left = steps;
      const onProgress = () => {
        if (--left === 0) stop.abort();
      };
      await evaluate(options({ ...equalCount, evaluated: { home }, onProgress, signal: stop.signal })).catch(
        () => {},
      );
    }
    expect(figures(await evaluate(options({ ...equalCount, evaluated: { home } })))).toEqual(figures(whole));
  }, 60_000);

  it('compares holes with surrogates, where a method is searched with what it is judged by', async () => {
    using replaced = await tinyHome();
    const { config, hash } = replaced.model.manifest;
    const path = join(replaced.home, 'surrogates.safetensors');
    const table = randomSurrogates(config, 32);
    await writeSurrogates(path, { model: hash as ModelHash, table, fitted: 'at random' });
    const model = await installSurrogates(replaced.home, 'tiny', path, { preset: false });
    const found = await evaluate(
      options({
        evaluated: { home: replaced.home, model },
        compared: {
          baselines: ['finercut', 'one-mask'],
          sparsities: [],
          flavours: [null, surrogatesOf(model)!],
        },
      }),
    );
    expect(found.rows.map(({ method, surrogate }) => [method, surrogate])).toEqual([
      ['dense', false],
      ...[false, true].flatMap((flavour) => [
        ['learned', flavour],
        ['one-mask', flavour],
      ]),
      ...[false, true].map((flavour) => ['finercut', flavour]),
    ]);
    const [holes, surrogates] = found.rows.filter(({ method }) => method === 'learned');
    expect(holes!.kl).not.toBeCloseTo(surrogates!.kl, 3);
    expect(holes!.attention).toBe(surrogates!.attention);
  }, 60_000);

  it('checks what the paper asks for', async () => {
    const { checks, rows } = await evaluate(
      options({
        ...equalCount,
        checks: { facts: data, longTokens: 300 },
        compared: { baselines: ['finercut'] },
      }),
    );
    expect(checks!.recall!.map(({ method }) => method)).toEqual(rows.map(({ method }) => method));
    expect(checks!.recall![0]).toMatchObject({ method: 'dense', kl: 0, agreement: 1, facts: 6 });
    expect(checks!.clustersByTask![0]!.kinds.map(({ counts }) => counts)).toEqual([
      [3, 0],
      [0, 3],
    ]);
    const cliff = checks!.cliff!;
    expect(cliff.at(-1)!.sparsity).toBe(0.5);
    expect(cliff.at(-1)!.kl).toBeGreaterThan(cliff[1]!.kl);
    expect(checks!.narrow).toMatchObject({ sparsity: 0.25 });
    const [dense, learned] = checks!.longText!;
    expect(dense!.windows.map(({ from, to }) => [from, to])).toEqual([
      [0, 256],
      [256, 300],
    ]);
    const html = reportHtml({
      evaluation: { ...(await evaluate(options({ compared: { baselines: [] } }))), checks: checks! },
    });
    for (const title of ['Where quality falls off', 'Recall of 6 right answers', 'judged by the dense model'])
      expect(html).toContain(title);
    // A text of a model's own is likelier to it than that of a pruned one.
    expect(learned!.windows[0]!.perplexity).toBeGreaterThan(dense!.windows[0]!.perplexity);
  }, 120_000);

  it('makes do with one row to score and one to calibrate on', async () => {
    const row = { question: 'How many legs has a dog?', answer: 'It has four legs.' };
    const files = ['one', 'other'].map((name) => join(tiny.home, `${name}.jsonl`));
    writeFileSync(files[0]!, JSON.stringify(row));
    writeFileSync(files[1]!, JSON.stringify({ ...row, question: 'How many legs has a cat?' }));
    const found = await evaluate(
      options({ rows: { data: [files[0]!], calibration: [files[1]!] }, checks: withoutFacts }),
    );
    expect(evaluationSchema.parse(JSON.parse(JSON.stringify(found)))).toEqual(found);
    expect([...new Set(found.rows.map(({ method }) => method))]).toEqual(METHODS);
    expect(found.rows[0]).toMatchObject({ rows: 1, intervals: { kl: null } });
    expect(found.data).toEqual({ read: 1, repeated: 0, calibrating: 0, learnedOn: 0, left: 1 });
    expect(found.notes).toEqual([expect.stringContaining('No recall check')]);
    expect(reportHtml({ evaluation: found })).toContain('of 1 rows 0 are repeated');
  }, 60_000);

  it('cuts rows where the context of the model ends', async () => {
    const files = ['long', 'calibration'].map((name) => join(tiny.home, `${name}.jsonl`));
    for (const file of files) writeFileSync(file, JSON.stringify({ text: `${file} and so on. `.repeat(60) }));
    const long = { data: [files[0]!], calibration: [files[1]!], tokensMax: 100_000 };
    const { rows } = await evaluate(
      options({ ...equalCount, rows: long, compared: { baselines: ['shortgpt'] } }),
    );
    expect(rows[0]!.positions).toBe(tiny.model.manifest.config.contextTokens - 1);
  }, 60_000);

  it('minds a row that the chat template refuses where it would use it, and before the work', async () => {
    const chatTemplate =
      "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}";
    const model = { ...tiny.model, manifest: { ...tiny.model.manifest, chatTemplate } };
    const many = join(tiny.home, 'many.jsonl');
    const messages = ['system', 'user'].map((role) => ({ role, content: `${role} speaks` }));
    // A few of these rows have text enough, and the refused one is not among them.
    const texts = Array.from({ length: 100 }, (_, i) => ({ text: `Row ${i} says this and that, too. ` }));
    writeFileSync(many, [...texts, { messages }].map((row) => JSON.stringify(row)).join('\n'));
    const work: string[] = [];
    const onProgress = (stage: string) => void work.push(stage);
    const asked = options({
      ...equalCount,
      evaluated: { model },
      rows: { calibration: [many] },
      compared: { baselines: ['shortgpt'] },
      onProgress,
    });
    expect((await evaluate(asked)).rows[0]!.rows).toBe(6);
    work.length = 0;
    await expect(evaluate({ ...asked, checks: withoutFacts })).rejects.toThrow(
      /"user speaks" \(system, user\)/,
    );
    expect(work).toEqual([]);
  }, 60_000);

  it('says what it cannot check, and whose rows it cannot know', async () => {
    const learned = { ...set.learned, data: ['sums.jsonl', 'a.jsonl', 'b.jsonl'] };
    const found = await evaluate(
      options({
        checks: { facts: [], longTokens: 0 },
        compared: { baselines: ['last-k'], maskSets: [{ ...set, learned }] },
      }),
    );
    expect(found.checks).toEqual({});
    expect(found.notes).toEqual([
      expect.stringMatching(/^Masks were learned on a\.jsonl, b\.jsonl, not given here/),
      ...['recall', 'cliff', 'narrow calibration', 'long text'].map((check) =>
        expect.stringMatching(new RegExp(`^No ${check} check: `)),
      ),
    ]);
  }, 60_000);

  it('refuses, before the work, what would end in the middle of it', async () => {
    const refused = (changes: Changes) =>
      expect(evaluate(options({ ...changes, onProgress: () => expect.unreachable() }))).rejects;
    const write = (name: string, rows: readonly object[]) => {
      const path = join(tiny.home, name);
      writeFileSync(path, rows.map((row) => JSON.stringify(row)).join('\n'));
      return path;
    };
    const short = write('short.jsonl', [{ text: 'a' }]);
    await refused({ rows: { calibration: [short] } }).toThrow(/No row to calibrate on has a token/);
    await refused({ rows: { data: [short], calibration: data } }).toThrow(/No row has a token to score/);
    await refused({ checks: { facts: [join(tiny.home, 'none.jsonl')], longTokens: 300 } }).toThrow(
      /none\.jsonl/,
    );
    const ask = { goal: 'Sit', sol1: 'down', sol2: 'on', label: 0 };
    const path = write('two.jsonl', [ask, { ...ask, sol2: 'and '.repeat(2000) }]);
    const task = { task: 'piqa', path } as const;
    await refused({ tasks: { files: [task], limit: 4 } }).toThrow(
      /^piqa, question 2: a choice has more than \d+ tokens\.$/,
    );
    await refused({ tasks: { files: [task, task], limit: 4 } }).toThrow(/two files of piqa/);
    const learned = { ...set.learned, oneMask: 'ffff' };
    await refused({ compared: { maskSets: [{ ...set, learned }] } }).toThrow(
      /^small: learned\.oneMask: mask bits must be 2/,
    );
  }, 60_000);

  it('refuses a set of another model or encoder', async () => {
    const other = { ...set, model: { ...set.model, hash: 'b'.repeat(64) } };
    await expect(evaluate(options({ compared: { maskSets: [other] } }))).rejects.toMatchObject({
      code: 'invalid_mask_set',
      message: expect.stringMatching(/another tiny \(SHA-256 b{12}…\) than the installed one/),
    });
    const named = { ...other, model: { ...other.model, name: 'huge' } };
    await expect(evaluate(options({ compared: { maskSets: [named] } }))).rejects.toThrow(
      'for another model (huge), not for tiny',
    );
    const longer = { ...set, model: { ...set.model, blockCount: 12 } };
    await expect(evaluate(options({ compared: { maskSets: [longer] } }))).rejects.toThrow(
      'for 12 blocks, and tiny has 8',
    );
    const changed = { ...set, encoder: { ...set.encoder, revision: 'another' } };
    await expect(evaluate(options({ compared: { maskSets: [changed] } }))).rejects.toMatchObject({
      code: 'encoder_mismatch',
    });
  });

  it('ends its command line with one JSON object, and writes a page', async () => {
    const piqa = join(tiny.home, 'piqa.jsonl');
    writeFileSync(piqa, `${JSON.stringify({ goal: 'Sit', sol1: 'down', sol2: 'on', label: 0 })}\n`);
    const out = join(tiny.home, 'out');
    const args = [
      ...['evaluate', '--model', 'tiny', '--mask-set', join(tiny.home, 'set.json'), '--data', ...data],
      ...[
        '--baselines',
        'last-k,one-mask',
        '--limit',
        '4',
        '--tokens',
        '40',
        '--rounds',
        '1',
        '--threads',
        '1',
      ],
      ...['--tasks', piqa, '--out', out],
    ];
    const { stdout, stderr, status } = await saidInProcess({ MASKROUTE_HOME: tiny.home }, args);
    expect(status, stderr).toBe(0);
    const lines = stdout.trim().split('\n');
    const found = evaluationSchema.parse(JSON.parse(lines.at(-1)!));
    expect(found.rows.map(({ method }) => method)).toEqual(['dense', 'learned', 'one-mask', 'last-k']);
    expect(found.rows[0]!.tasks!.piqa).toMatchObject({ questions: 1, chance: 0.5 });
    expect(lines[0]).toContain('Equal count, 4 rows');
    expect(stderr).toMatch(
      /^data: of 60 rows 0 are repeated, \d+ calibrate, 0 were learned on, and \d+ can be/,
    );
    expect(evaluationSchema.parse(JSON.parse(readFileSync(join(out, 'evaluation.json'), 'utf8')))).toEqual(
      found,
    );
    const html = readFileSync(join(out, 'report.html'), 'utf8');
    expect(html).toContain('KL to dense against ms/token');
    expect(html).not.toMatch(/(src|href)=/);
  }, 60_000);

  it.skipIf(process.platform !== 'linux')('says before the work that its folder takes no files', async () => {
    const args = [
      'evaluate',
      '--model',
      'tiny',
      '--mask-set',
      join(tiny.home, 'set.json'),
      '--data',
      ...data,
    ];
    const env = { MASKROUTE_HOME: tiny.home };
    const { stderr } = await saidInProcess(env, [...args, '--out', '/proc']);
    expect(stderr).toMatch(/^error: Nothing can be written to \/proc: /);
  });

  it.skipIf(process.platform !== 'linux')(
    'writes what was found also where nobody can hear of it',
    () => {
      const cli = fileURLToPath(new URL('../../../../gpu-backend/cli/cli.ts', import.meta.url));
      const out = join(tiny.home, 'unheard');
      const args = [
        ...['evaluate', '--model', 'tiny', '--mask-set', join(tiny.home, 'set.json'), '--data', ...data],
        ...['--baselines', 'none', '--no-equal-time', '--limit', '2', '--rounds', '1', '--threads', '1'],
        ...['--out', out],
      ];
      const full = openSync('/dev/full', 'w');
      const { stderr, status } = spawnSync(process.execPath, [cli, ...args], {
        env: { ...process.env, MASKROUTE_HOME: tiny.home },
        stdio: ['ignore', full, 'pipe'],
        encoding: 'utf8',
      });
      closeSync(full);
      expect(stderr).toMatch(/\nerror: ENOSPC: [^\n]*\n$/);
      expect(status).toBe(1);
      const found = evaluationSchema.parse(JSON.parse(readFileSync(join(out, 'evaluation.json'), 'utf8')));
      expect(found.rows.map(({ method }) => method)).toEqual(['dense', 'learned']);
    },
    60_000,
  );
});
