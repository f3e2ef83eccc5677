/** A learning run as a whole: killed again and again, and what it leaves behind. */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, watch, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { tryLock } from '../../../gpu-backend/files.ts';
import { parseRow } from '../../../gpu-backend/learning/data/read-data.ts';
import { HELD_OUT_SHARE, isHeldOut } from '../../../gpu-backend/learning/data/samples.ts';
import { fastestRounding, ROUNDINGS } from '../../../gpu-backend/learning/gates/rounding.ts';
import { type LearnOptions, type LearnProgress, learn } from '../../../gpu-backend/learning/learn.ts';
import {
  reportHtml,
  writeEvaluationPage,
  writeLearnPage,
} from '../../../gpu-backend/learning/report/write-report.ts';
import { earlierMasks } from '../../../gpu-backend/learning/search/earlier-set.ts';
import { learnReportSchema } from '../../../gpu-backend/learning/search/learn-report.ts';
import { type SweepRow, sweepClusters } from '../../../gpu-backend/learning/sweep.ts';
import { sha256OfFiles } from '../../../gpu-backend/model/store.ts';
import type { Surrogates } from '../../../gpu-backend/model/surrogates.ts';
import { createRandom } from '../../../gpu-backend/random.ts';
import { saidOfRouting } from '../../../shared/mask/held-out.ts';
import { maskBits, type SurrogatesId } from '../../../shared/mask/mask.ts';
import { maskSetSchema } from '../../../shared/mask/mask-set.ts';
import { expectFits } from '../../e2e/browser.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';
import { startFakeHub } from '../../support/fake-hub.ts';
import { SMALL_EFFORT, smallRun, writeSmallData } from './small-run.ts';

const KILLS = 3;
let folder = '';
/** A run that nothing disturbed, in the folder `whole`. */
let whole: Awaited<ReturnType<typeof learn>>;
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-learn-'));
  await writeSmallData(join(folder, 'data'));
  whole = await learn(await options('whole'));
}, 60_000);
afterAll(() => rmSync(folder, { recursive: true }));

const read = (out: string, file: string) => readFileSync(join(folder, out, file), 'utf8');
type Grouped = 'budget' | 'search' | 'machine' | 'output';
type Changes = Partial<Omit<LearnOptions, Grouped>> & {
  readonly [Group in Grouped]?: Partial<LearnOptions[Group]>;
};
async function options(out: string, changes: Changes = {}): Promise<LearnOptions> {
  const small = await smallRun(folder, out);
  return {
    ...small,
    ...changes,
    budget: { ...small.budget, ...changes.budget },
    search: { ...small.search, ...changes.search },
    machine: { ...small.machine, ...changes.machine },
    output: { ...small.output, ...changes.output },
  };
}

/** Killed after so many results, or ends by itself; resolves to whether it ended by itself. Rejects when it fails. */
async function runChild(out: string, killAfter: number): Promise<boolean> {
  const child = fork(fileURLToPath(new URL('./small-run.ts', import.meta.url)), [folder, out]);
  child.on('message', (results) => {
    if (Number(results) >= killAfter) child.kill('SIGKILL');
  });
  const [code, signal] = await once(child, 'exit');
  if (signal !== 'SIGKILL' && code !== 0) throw new Error(`the run ended with code ${code}`);
  return signal === null;
}

describe('learn', () => {
  it('killed three times at random ends with the same bytes as a run that was not', async () => {
    const random = createRandom(11);
    for (let kill = 0; kill < KILLS; kill++) {
      // Each attempt reads back what is known and gets a little farther.
      expect(await runChild('killed', 50 * kill + 1 + random.below(60))).toBe(false);
    }
    const visible = readdirSync(join(folder, 'killed')).filter((name) => !name.startsWith('.'));
    expect(visible).toEqual(['state.jsonl']);
    expect(await runChild('killed', Number.POSITIVE_INFINITY)).toBe(true);
    expect(read('killed', 'mask-set.json')).toBe(read('whole', 'mask-set.json'));
    expect(read('killed', 'report.json')).toBe(read('whole', 'report.json'));
    expect(readdirSync(join(folder, 'killed')).sort()).toEqual([
      '.lock',
      'mask-set.json',
      'report.html',
      'report.json',
    ]);
    expect(whole.report.clusters).toHaveLength(2);
  }, 240_000);

  it('rounds as the machine did that began it', async () => {
    const own = ROUNDINGS.indexOf(await fastestRounding());
    const run = await options('moved');
    const stop = new AbortController();
    const onProgress = (progress: LearnProgress) => 'done' in progress && stop.abort(new Error('stopped'));
    const stopped = learn({ ...run, hooks: { ...run.hooks, onProgress, signal: stop.signal } });
    await expect(stopped).rejects.toThrow('stopped');
    const line = (rounding: number) => `["rounding",[${rounding}]]`;
    const begun = read('moved', 'state.jsonl');
    expect(begun.split('\n')[1]).toBe(line(own));
    writeFileSync(join(folder, 'moved', 'state.jsonl'), begun.replace(line(own), line(1 - own)));
    await learn(run);
    expect(read('moved', 'report.json')).not.toBe(read('whole', 'report.json'));
  }, 60_000);

  it('has its folder for itself: a second run there would mix its results with those of the first', async () => {
    const unlock = tryLock(join(folder, 'whole', '.lock'))!;
    await expect(learn(await options('whole', { budget: { sparsity: 0.5 } }))).rejects.toMatchObject({
      code: 'conflict',
      message: expect.stringMatching(/Another run writes .*whole: .*--out/),
    });
    unlock();
    expect(JSON.parse(read('whole', 'mask-set.json'))).toEqual(whole.maskSet);
  });

  it('gives a mask set and a report that hold together', async () => {
    const { maskSet, report } = whole;
    expect(maskSetSchema.parse(JSON.parse(read('whole', 'mask-set.json')))).toEqual(maskSet);
    expect(learnReportSchema.parse(JSON.parse(read('whole', 'report.json')))).toEqual(report);
    expect(maskSet).toMatchObject({ targetSparsity: 0.25, reachedSparsity: 0.25, surrogate: false });
    expect(maskSet.learned).toMatchObject({
      method: 'hard-concrete',
      oneMask: report.oneMask.bits,
      dataHash: await sha256OfFiles((await options('whole')).data.files),
    });
    expect(Object.keys(maskSet.heldOut)).toEqual(
      expect.arrayContaining(['dense', 'learned', 'one-mask', 'clusters', 'nearest']),
    );
    const { headroom, nearest } = saidOfRouting(maskSet);
    expect(headroom).toEqual(report.sharing!.headroom);
    expect(nearest!.far).toBeGreaterThanOrEqual(nearest!.median);
    expect(nearest!.median).toBeGreaterThan(0);
    expect(report.information_bits.fit).toBeCloseTo(1, 1);
    expect(report.masks[0]).toMatchObject({ bits: report.oneMask.bits });
    for (const mask of report.masks) {
      expect([...mask.skipAttention, ...mask.skipFfn]).toHaveLength(2);
      expect(mask.curve).toHaveLength(2);
    }
    for (const cluster of report.clusters) expect(cluster.bits).toBe(report.masks[cluster.maskIndex]!.bits);
    const { pool, validated_kl, rows } = report.sharing!;
    expect(rows).toBeGreaterThan(4);
    // Two searched masks, and as many composed ones as differ from the others.
    const most = SMALL_EFFORT.masksMax + SMALL_EFFORT.compose.masks;
    expect(validated_kl).toHaveLength(Math.min(most, pool.length));
    // The mask for everybody competes with all others, and each mask once.
    expect(new Set(pool.map(({ bits }) => bits)).size).toBe(pool.length);
    expect(pool.map(({ bits }) => bits)).toContain(report.oneMask.bits);
    const html = reportHtml({ learn: report });
    expect(html).toContain('Does routing pay?');
    expect(html).not.toContain('NaN');
    const verdict = /<p class="verdict">(.*?)<\/p>/s.exec(html)![1]!;
    expect(verdict).toMatch(
      /^The masks skip 25.0 % of the blocks and agree .* of held-out tokens\. (Routing among|All clusters share) /,
    );
  }, 60_000);

  it('has a page that fits 390 and 1440 pixels, light and dark, as an evaluation has', async () => {
    const ofEvaluation = join(folder, 'evaluation.html');
    writeFileSync(ofEvaluation, reportHtml({ evaluation: madeUpEvaluation('v_1') }));
    await expectFits(join(folder, 'whole', 'report.html'), ofEvaluation);
  }, 60_000);

  it('shows an evaluation on its page only if that judged the same set', async () => {
    const { report } = whole;
    const at = join(folder, 'pages');
    mkdirSync(at);
    const verdict = () => /<p class="verdict">(.*?)<\/p>/s.exec(read('pages', 'report.html'))![1]!;
    const write = (version: string) =>
      writeFileSync(join(at, 'evaluation.json'), JSON.stringify(madeUpEvaluation(version)));
    write('v_of_an_earlier_set');
    await writeLearnPage(at, report);
    expect(verdict()).toMatch(/^The masks skip 25.0 % /);
    write(report.version);
    await writeLearnPage(at, report);
    expect(verdict()).toMatch(/^The learned masks take 11.9 % less time/);
    // The other way round: the folder has the report of a set that was not evaluated.
    const mine = madeUpEvaluation(report.version);
    writeFileSync(
      join(at, 'report.json'),
      JSON.stringify({ ...report, version: 'v_another', name: 'another' }),
    );
    await writeEvaluationPage(at, mine, [join(folder, 'whole')]);
    expect(read('pages', 'report.html')).toContain('<title>small');
    await writeEvaluationPage(at, mine, []);
    expect(read('pages', 'report.html')).not.toContain('another');
  });

  it('layer by layer, for want of memory, comes to the same bytes', async () => {
    const mask = { ...SMALL_EFFORT.one, searchPositions: 60, gateSteps: 1, rounds: 0, exchanges: 1 };
    const little = { ...SMALL_EFFORT, one: { ...mask, greedyEvaluations: 2 }, choicePositions: 30 };
    const one = { clusterCount: 1, search: { effort: { ...little, heldOutPositions: 30 } } };
    // The graph of a layer lies beside the model while it opens.
    const opened = { one: 0, layers: 0 };
    for (const [out, machine] of [
      ['one', {}],
      ['layers', { machine: { memory_bytes: 1 } }],
    ] as const) {
      const watcher = watch(join(folder, 'model'), (_, name) => {
        if (name?.startsWith('.layer.onnx.')) opened[out]++;
      });
      await learn(await options(out, { ...one, ...machine }));
      watcher.close();
    }
    expect(read('layers', 'mask-set.json')).toBe(read('one', 'mask-set.json'));
    expect(opened.one).toBe(0);
    expect(opened.layers).toBeGreaterThan(8);
  }, 60_000);

  it('keeps the counts that it is told', async () => {
    const exactly = (count: number) => ({ min: count, max: count });
    const { report } = await learn(
      await options('counts', { budget: { attention: exactly(0), ffn: exactly(2) } }),
    );
    for (const { skipAttention, skipFfn } of [...report.masks, ...report.clusters])
      expect([skipAttention.length, skipFfn.length]).toEqual([0, 2]);
    const impossible = await options('impossible', { budget: { attention: exactly(0), ffn: exactly(3) } });
    await expect(learn(impossible)).rejects.toThrow(/No mask leaves out 25.0 %/);
  }, 60_000);

  it('measures the mask for everybody in other sizes, too, and leaves out what was asked for on average', async () => {
    const effort = { ...SMALL_EFFORT, sizes: [0, 0.5, 1.5] };
    const { report, maskSet } = await learn(await options('sizes', { search: { effort } }));
    const outOf = (bits: string) =>
      [...bits].reduce(
        (sum, digit) => sum + [...Number.parseInt(digit, 16).toString(2)].filter((bit) => bit === '1').length,
        0,
      );
    const sizes = report.sharing!.pool.map(({ bits }) => 8 - outOf(bits));
    expect(sizes).toEqual(expect.arrayContaining([0, 1, 2, 3]));
    // The dense model costs nothing.
    expect(report.sharing!.pool[0]).toMatchObject({ bits: 'ff', kl: 0 });
    const [attention, ffn] = [report.oneMask.skipAttention, report.oneMask.skipFfn];
    expect(attention.length + ffn.length).toBe(2);
    const { masksMax, compose } = effort;
    expect(report.sharing!.validated_kl.length).toBeLessThanOrEqual(
      masksMax + compose.masks + effort.sizes.length,
    );
    if (report.sharing!.reason === null) expect(report.sharing!.headroom!.skipped).toBeDefined();
    else expect(maskSet.reachedSparsity).toBe(0.25);
  }, 60_000);

  it('by time: leaves out at least the share of the measured milliseconds', async () => {
    const { report, maskSet } = await learn(
      await options('time', { budget: { cost: 'time' }, clusterCount: 1 }),
    );
    expect(report.budget.cost).toBe('time');
    expect(report.budget.weights.ffn).toBeGreaterThan(0);
    expect(report.budget.reached).toBeGreaterThanOrEqual(0.25 - 1e-9);
    expect(maskSet.learned.blockWeights).toEqual(report.budget.weights);
  }, 60_000);

  it('begins with the masks of an earlier set, and refuses a set that it cannot begin with', async () => {
    const earlier = whole.maskSet;
    const { maskSet, report } = await learn(
      await options('again', { search: { earlier }, output: { name: 'again' } }),
    );
    const from = whole.report.version;
    expect(maskSet.learned).toMatchObject({ from, oneMask: whole.report.oneMask.bits, effort: { turns: 0 } });
    expect(report.masks.every(({ curve, gates }) => curve.length === 0 && gates === null)).toBe(true);
    const known = new Set([earlier.learned.oneMask, ...earlier.clusters.map(({ bits }) => bits)]);
    const pool = report.sharing!.pool.filter(({ source }) => source === 'the earlier set');
    expect(new Set(pool.map(({ bits }) => bits))).toEqual(known);
    expect(reportHtml({ learn: report })).toContain('the earlier set');
    // A lighter mask costs less, and is not the mask for everybody.
    const lighter = {
      ...earlier,
      clusters: earlier.clusters.map((cluster) => ({ ...cluster, bits: 'f'.repeat(cluster.bits.length) })),
    };
    const within = await learn(await options('lighter', { search: { earlier: lighter } }));
    expect(within.maskSet.learned.oneMask).toBe(earlier.learned.oneMask);
    expect(within.maskSet.reachedSparsity).toBe(0.25);
    const refusals: [Pick<Changes, 'budget' | 'search'>, RegExp][] = [
      [{ budget: { sparsity: 0.5 } }, /leaves out .* blocks, for a sparsity of 0.25, not of 0.5/],
      [{ budget: { cost: 'time' } }, /its sparsity is a share of blocks, not of time/],
      [
        { search: { earlier: { ...earlier, model: { ...earlier.model, hash: '0'.repeat(64) } } } },
        /it is for .*, not for/,
      ],
      [
        { search: { earlier: { ...earlier, surrogate: true, surrogates: `s_${'0'.repeat(24)}` } } },
        /was learned with surrogates/,
      ],
      [{ search: { earlier: { ...earlier, learned: {} } } }, /does not say how it was learned/],
      [
        { search: { earlier: { ...earlier, learned: { ...earlier.learned, oneMask: 'fff' } } } },
        /is damaged/,
      ],
    ];
    for (const [changes, why] of refusals)
      await expect(learn(await options('refused', { search: { earlier }, ...changes }))).rejects.toThrow(why);
  }, 60_000);

  it('takes masks over to a table of surrogates that was made for them', async () => {
    const tableOf = (digit: string) => `s_${digit.repeat(24)}` as SurrogatesId;
    const set = { ...whole.maskSet, surrogate: true, surrogates: tableOf('0') };
    const { model } = await options('tuned');
    const tuned = { id: tableOf('1') } as Surrogates;
    const { masks } = earlierMasks(set, { model, surrogates: tuned, cost: 'blocks' });
    expect(masks.map(maskBits)).toContain(set.learned.oneMask);
    expect(() => earlierMasks(whole.maskSet, { model, surrogates: tuned, cost: 'blocks' })).toThrow(
      /was learned without surrogates/,
    );
  });

  it('compares numbers of clusters, and learns the mask for everybody once', async () => {
    const seen: SweepRow[] = [];
    const { clusterCount: _, ...rest } = await options('sweep');
    let second: Promise<unknown> | undefined;
    const rows = await sweepClusters(rest, [1, 2], (row) => {
      seen.push(row);
      // It has its folder for itself between two numbers, too.
      second ??= sweepClusters(rest, [2], () => {}).catch((error) => error);
      // What is known stays, should a later number be too large for the data.
      expect(JSON.parse(read('sweep', 'sweep.json'))).toEqual({ rows: seen });
    });
    expect(seen).toEqual(rows);
    expect(await second).toMatchObject({ code: 'conflict' });
    expect(rows[0]!.kl).toBe(rows[0]!.oneMask_kl);
    expect(rows[1]!.oneMask_kl).toBe(
      JSON.parse(read('sweep/clusters-2', 'report.json')).heldOut['one-mask'].kl,
    );
    expect(readdirSync(join(folder, 'sweep')).sort()).toEqual([
      ...['.lock', 'clusters-1', 'clusters-2', 'sweep.json'],
    ]);
    // Two clusters have what they have alone, whatever was learned before in the same state.
    expect(read('sweep/clusters-2', 'mask-set.json')).toBe(read('whole', 'mask-set.json'));
    const one = JSON.parse(read('sweep/clusters-1', 'report.json'));
    expect(one.clusters[0].bits).toBe(one.oneMask.bits);
  }, 60_000);

  it('does not compare numbers of clusters where no prompt is held out', async () => {
    const data = join(folder, 'data', 'one.jsonl');
    writeFileSync(data, '{"text": "This is the only row that there is to learn from."}');
    const { clusterCount: _, ...rest } = await options('few', { data: { files: [data] } });
    await expect(sweepClusters(rest, [1], () => {})).rejects.toMatchObject({ code: 'invalid_data' });
  }, 60_000);

  it('names a row that the chat template refuses, before any work', async () => {
    const { model, data } = await options('template');
    const chatTemplate =
      "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}";
    const refused = join(folder, 'data', 'refused.jsonl');
    const turns = (i: number) =>
      ['system', 'user', 'assistant'].map((role) => ({ role, content: `${role} speaks ${i}` }));
    const lines = Array.from({ length: 100 }, (_, i) => JSON.stringify({ messages: turns(i) }));
    // A group of clusters is searched on it, and nothing before draws it.
    const searched = lines.find((line) => {
      const row = parseRow(line, 'refused', 'refused:1');
      return !isHeldOut(row, HELD_OUT_SHARE) && !isHeldOut(row, 0.25, 'choice');
    });
    writeFileSync(refused, searched!);
    const one = { ...SMALL_EFFORT.one, searchPositions: 1 };
    const changes = {
      model: { ...model, manifest: { ...model.manifest, chatTemplate } },
      data: { files: [...data.files, refused] },
      seed: 2,
      search: { effort: { ...SMALL_EFFORT, one, compose: { masks: 0, blocks: 0, positions: 0 } } },
    };
    await expect(learn(await options('template', changes))).rejects.toMatchObject({
      code: 'invalid_data',
      message: expect.stringMatching(
        /begins with "user speaks \d+" \(system, user, assistant\): .* no system role/,
      ),
    });
    expect(read('template', 'state.jsonl')).toMatch(/^.*\n\["rounding",.*\n$/);
  }, 60_000);

  it('says that answers are too far from the beginnings of their rows to be scored', async () => {
    const data = join(folder, 'data', 'far.jsonl');
    const row = (i: number) => ({ question: `${i} `.repeat(SMALL_EFFORT.tokensMax), answer: 'a' });
    writeFileSync(data, Array.from({ length: 20 }, (_, i) => JSON.stringify(row(i))).join('\n'));
    const search = { effort: { ...SMALL_EFFORT, scored: 'answers' as const } };
    const far = learn(await options('far', { data: { files: [data] }, search }));
    await expect(far).rejects.toMatchObject({
      code: 'invalid_data',
      message: expect.stringMatching(/first \d+ tokens are read, and no answer begins there/),
    });
  }, 60_000);

  it('told to stop downloads no encoder', async () => {
    const hub = await startFakeHub({ repository: 'owner/encoder', files: {} });
    vi.stubEnv('HF_ENDPOINT', hub.url);
    const run = await options('stopped', { encoder: 'hf:owner/encoder', machine: { home: folder } });
    const hooks = { ...run.hooks, signal: AbortSignal.abort(new Error('stopped')) };
    await expect(learn({ ...run, hooks })).rejects.toThrow();
    expect(hub.requests).toEqual([]);
    vi.unstubAllEnvs();
    await hub.close();
  });

  it('refuses a name that no mask set can have before any work', async () => {
    await expect(learn(await options('named', { output: { name: 'a b' } }))).rejects.toThrow(/cannot name/);
  });
});
