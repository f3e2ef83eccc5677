/** A learning run on several machines: its bytes, and what becomes of it when anything on the way breaks. */
import { spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { startValkey } from '../../../../gpu-backend/bench/valkey-server.ts';
import { openJobs } from '../../../../gpu-backend/jobs/job-queue.ts';
import { openSchedules } from '../../../../gpu-backend/jobs/schedules.ts';
import { ROUNDINGS } from '../../../../gpu-backend/learning/gates/rounding.ts';
import { type LearnOptions, learn } from '../../../../gpu-backend/learning/learn.ts';
import { openQueuedUnits } from '../../../../gpu-backend/learning/units/queued-units.ts';
import {
  type BatchUnit,
  describeWork,
  sameWork,
  unitName,
  workOf,
  workSchema,
} from '../../../../gpu-backend/learning/units/unit.ts';
import { openLocalUnits } from '../../../../gpu-backend/learning/units/unit-computer.ts';
import { openUnitJournal } from '../../../../gpu-backend/learning/units/unit-journal.ts';
import { BEAT_ms, claimUnit, connectQueue } from '../../../../gpu-backend/learning/units/unit-queue.ts';
import { createScheduleSchema } from '../../../../shared/admin/job-wire.ts';
import type { ModelHash } from '../../../../shared/mask/mask.ts';
import { saidInProcess } from '../../cli/in-process.ts';
import { type TinyHome, tinyHome } from '../evaluation/tiny.ts';
import { SMALL_EFFORT, smallRun, writeSmallData } from '../small-run.ts';
import { cli, Machines, soon, startCommand } from './machines.ts';

let tiny: TinyHome;
let folder = '';
let data: string[] = [];
/** Of a run in one process. */
let expected: Bytes;
beforeAll(async () => {
  tiny = await tinyHome();
  folder = mkdtempSync(join(tmpdir(), 'maskroute-machines-'));
  data = await writeSmallData(join(folder, 'data'));
  await learn(await options('alone'));
  expected = bytesOf('alone');
}, 120_000);
afterAll(() => {
  rmSync(folder, { recursive: true });
  tiny[Symbol.dispose]();
});

type Bytes = { readonly set: string; readonly report: string };
const bytesOf = (out: string): Bytes => ({
  set: readFileSync(join(folder, out, 'mask-set.json'), 'utf8'),
  report: readFileSync(join(folder, out, 'report.json'), 'utf8'),
});

/** Enough units to break in on between them, and few others. */
const mask = { ...SMALL_EFFORT.one, searchPositions: 60, exchanges: 1, triesMax: 2 };
const effort = {
  ...SMALL_EFFORT,
  one: { ...mask, greedyEvaluations: 10 },
  group: mask,
  compose: { masks: 1, blocks: 2, positions: 60 },
  sizeExchanges: 1,
  turns: 1,
  sharePositions: 60,
  heldOutPositions: 60,
};
const options = async (out: string): Promise<LearnOptions> => ({
  ...(await smallRun(folder, out)),
  model: tiny.model,
  data: { files: data },
  search: { effort },
});

type ClusterOptions = { readonly silent_ms?: number; readonly home?: string };

/** A queue of its own, and a journal folder of its own, with as many workers. `silent_ms`: of the runs; `home`: of the workers. */
async function cluster(workers: number, { silent_ms, home = tiny.home }: ClusterOptions = {}) {
  const server = await startValkey();
  const journal = mkdtempSync(join(folder, 'journal-'));
  const machines = new Machines(server.url, journal, home);
  for (let i = 0; i < workers; i++) machines.start();
  await soon(() => machines.all.every((machine) => machine.said().includes('waits for a run')));
  const said: string[] = [];
  const open = openQueuedUnits({
    url: server.url,
    journal,
    say: (line) => said.push(line),
    ...(silent_ms !== undefined && { silent_ms }),
  });
  return {
    server,
    journal,
    machines,
    said,
    open,
    learn: async (out: string) => {
      const run = await options(out);
      await learn({ ...run, machine: { ...run.machine, openUnits: open } });
      return bytesOf(out);
    },
    /** What a worker tells of a unit comes a moment after the unit's numbers. */
    toldOf: (units: number) => soon(() => machines.computed().length >= units),
    entries: () =>
      readdirSync(journal, { recursive: true }).filter((name) => /[0-9a-f]{64}/.test(`${name}`)).length,
    /** Nothing is queued, known or told any more; the workers are there as before. */
    async forget() {
      await machines.redis.flushall();
      for (const name of readdirSync(journal))
        if (name !== 'journal.json') rmSync(join(journal, name), { recursive: true });
      for (const { computed } of machines.all) computed.splice(0);
      said.splice(0);
    },
    async [Symbol.asyncDispose]() {
      await machines[Symbol.asyncDispose]();
      await server[Symbol.asyncDispose]();
    },
  };
}

/** Units that take a third of a second each: much text, and all of it different. */
const LONG_TOKENS = 256;
const longUnit = (seed: number, sequences = 4): BatchUnit => {
  const tokenIds = Array.from({ length: sequences * LONG_TOKENS }, (_, i) => 3 + ((i * 7 + seed * 31) % 250));
  const scoredRows = [seed, seed + 1];
  return {
    kind: 'step',
    targets: 'next-token',
    gates: new Array(8).fill(1),
    batch: { tokenIds, sequences, scoredRows, nextIds: scoredRows.map((row) => tokenIds[row + 1]!) },
  };
};

const run = { surrogates: undefined, threads: 1, rounding: 'blocks', signal: undefined } as const;
const LONG_UNITS = Array.from({ length: 4 }, (_, seed) => longUnit(seed));
let longNumbers: Promise<(readonly number[])[]> | undefined;
/** Of the long units, computed once. */
const expectedLong = () => {
  longNumbers ??= computedHere(LONG_UNITS);
  return longNumbers;
};
async function computedHere(units: readonly BatchUnit[]): Promise<(readonly number[])[]> {
  await using here = await openLocalUnits({ ...run, model: tiny.model });
  return await Promise.all(units.map((unit) => here.run(unit)));
}

describe('two workers', () => {
  let site: Awaited<ReturnType<typeof cluster>>;
  beforeAll(async () => {
    site = await cluster(2);
  }, 120_000);
  beforeEach(() => site.forget());
  afterAll(() => site[Symbol.asyncDispose]());

  it('come to the bytes of one process, and compute each unit once', async () => {
    expect(await site.learn('two')).toEqual(expected);
    await site.toldOf(site.entries());
    expect(site.machines.twice()).toEqual([]);
    for (const { computed } of site.machines.all) expect(computed.length).toBeGreaterThan(0);

    // The journal has all of it: another run computes what is damaged there, and nothing else.
    const before = site.machines.computed().length;
    const [damaged, swapped, other] = site.machines.computed();
    const fileOf = (unit: string) => join(site.journal, unit.slice(0, 2), `${unit}.json`);
    const entry = JSON.parse(readFileSync(fileOf(damaged!), 'utf8'));
    writeFileSync(
      fileOf(damaged!),
      JSON.stringify({ ...entry, values: entry.values.map((v: number) => v + 1) }),
    );
    writeFileSync(fileOf(swapped!), readFileSync(fileOf(other!)));
    expect(await site.learn('damaged')).toEqual(expected);
    await site.toldOf(before + 2);
    expect(site.machines.twice().sort()).toEqual([damaged, swapped].sort());
    expect(site.said.filter((line) => line.includes('is damaged'))).not.toEqual([]);
    expect(JSON.parse(readFileSync(fileOf(damaged!), 'utf8'))).toEqual(entry);
  }, 300_000);

  it('compute nothing twice when the queue is flushed in mid-run, which loses what waits', async () => {
    const units = LONG_UNITS;
    const queued = await site.open({ ...run, model: tiny.model });
    const found = Promise.all(units.map((unit) => queued.run(unit)));
    await soon(async () => (await site.machines.claims()).length > 1);
    await site.machines.redis.flushall();
    expect(await found).toEqual(await expectedLong());
    await queued[Symbol.asyncDispose]();
    await site.toldOf(units.length);
    expect(site.machines.twice()).toEqual([]);
    expect(site.machines.computed()).toHaveLength(units.length);

    const learned = site.learn('flushed');
    for (let flush = 0; flush < 2; flush++) {
      const after = site.machines.computed().length + 20;
      await soon(() => site.machines.computed().length > after);
      await site.machines.redis.flushall();
    }
    expect(await learned).toEqual(expected);
    await site.toldOf(site.entries());
    expect(site.machines.twice()).toEqual([]);
  }, 300_000);

  it('wait with the run for a queue that is away, and go on when it is back with nothing in it', async () => {
    const learned = site.learn('away');
    await soon(() => site.machines.computed().length > 30);
    await site.server.stop();
    await soon(() => site.said.some((line) => line.includes('is unreachable')));
    // The units at hand end, and no others begin.
    await sleep(1000);
    const before = site.machines.computed().length;
    await sleep(1000);
    expect(site.machines.computed()).toHaveLength(before);
    await site.server.start();
    expect(await learned).toEqual(expected);
    await site.toldOf(site.entries());
    expect(site.machines.twice()).toEqual([]);
    expect(site.said.some((line) => line.includes('is back'))).toBe(true);
  }, 300_000);

  it('go on when one is killed in mid-unit: only its unit is done again', async () => {
    const units = LONG_UNITS;
    await using queued = await site.open({ ...run, model: tiny.model });
    const found = Promise.all(units.map((unit) => queued.run(unit)));
    await soon(async () => (await site.machines.claims()).length > 1);
    const [lost] = await site.machines.claims();
    const victim = site.machines.all.find(({ child }) => child.pid === lost!.pid)!;
    victim.child.kill('SIGKILL');
    expect(await found).toEqual(await expectedLong());
    await site.toldOf(units.length);
    const work = workOf(tiny.model, undefined, 'blocks');
    expect(site.machines.computed().sort()).toEqual(units.map((unit) => unitName(work, unit)).sort());
    expect(victim.computed).not.toContain(lost!.unit);
  }, 300_000);
});

it('of two workers with one unit the second waits: for the numbers of the first, or until that one gives the unit up', async () => {
  await using server = await startValkey();
  const journal = await openUnitJournal(mkdtempSync(join(folder, 'journal-')), () => {});
  const redis = connectQueue(server.url, () => {});
  using cleaning = new DisposableStack();
  cleaning.defer(() => redis.disconnect());
  /** A claim, and whether it is decided yet. */
  const claim = (unit: string, worker: string) => {
    const state = { isDecided: false };
    const isDone = async () => (await journal.read(unit)) !== undefined;
    const claimed = claimUnit(redis, unit, worker, isDone).finally(() => {
      state.isDecided = true;
    });
    return { state, claimed };
  };
  for (const isComputed of [true, false]) {
    const unit = unitName(workOf(tiny.model, undefined, 'blocks'), longUnit(isComputed ? 1 : 2));
    const first = await claim(unit, 'first').claimed;
    const second = claim(unit, 'second');
    await sleep(BEAT_ms);
    expect(second.state.isDecided).toBe(false);
    if (isComputed) await journal.write(unit, [1, 2]);
    else first![Symbol.dispose]();
    const found = await second.claimed;
    expect(found === undefined).toBe(isComputed);
    expect(await journal.read(unit)).toEqual(isComputed ? [1, 2] : undefined);
    for (const held of [first, found]) held?.[Symbol.dispose]();
  }
}, 60_000);

it('a worker with another model, version or journal is refused by name, and the run hears of it', async () => {
  await using site = await cluster(0);
  using other = await tinyHome();
  const manifest = { ...tiny.model.manifest, hash: 'b'.repeat(64) };
  writeFileSync(join(other.model.folder, 'model.json'), JSON.stringify(manifest));
  const queued = await site.open({ ...run, model: tiny.model });
  const found = queued.run(longUnit(1, 1));

  const flags = ['work', '--queue', site.server.url, '--journal'];
  const stranger = startCommand(other.home, [...flags, site.journal]);
  expect(await stranger.ended).toBe(1);
  expect(stranger.said()).toMatch(
    /error: Refused: .*tiny \(f32, aaaaaaaaaaaa, .* has tiny \(f32, bbbbbbbbbbbb/,
  );
  await soon(() =>
    site.said.some((line) => line.includes('does not take part') && line.includes('bbbbbbbbbbbb')),
  );

  const elsewhere = startCommand(tiny.home, [...flags, join(folder, 'journal-elsewhere')]);
  expect(await elsewhere.ended).toBe(1);
  expect(elsewhere.said()).toMatch(/error: Refused: .* another folder .* --journal/);

  const nameless = startCommand(tiny.home, [...flags, site.journal, '--model', 'nobody']);
  expect(await nameless.ended).toBe(1);
  expect(nameless.said()).toMatch(/error: .*nobody/);

  site.machines.start();
  expect(await found).toEqual((await computedHere([longUnit(1, 1)]))[0]);
  const announced = JSON.parse((await site.machines.redis.get('maskroute:learns'))!);
  await queued[Symbol.asyncDispose]();
  // A run that is over keeps no other waiting, and no worker of another from the queue.
  expect(await site.machines.redis.get('maskroute:learns')).toBeNull();

  const newer = { ...announced, work: { ...announced.work, version: '9.0.0' } };
  await site.machines.redis.set('maskroute:learns', JSON.stringify(newer));
  const [worker] = site.machines.all;
  expect(await worker!.ended).toBe(1);
  expect(worker!.said()).toMatch(/error: Refused: the run needs tiny .* version 9\.0\.0, .* version \d/);
}, 300_000);

it('workers round as the machine did that began the run, whatever their own would do', async () => {
  using rounded = await tinyHome('q8');
  await using site = await cluster(1, { home: rounded.home });
  const unit = longUnit(1);
  const all: (readonly number[])[] = [];
  for (const rounding of ROUNDINGS) {
    const asked = { ...run, model: rounded.model, rounding };
    await using queued = await site.open(asked);
    await using here = await openLocalUnits(asked);
    all.push(await queued.run(unit));
    expect(all.at(-1)).toEqual(await here.run(unit));
  }
  expect(all[1]).not.toEqual(all[0]);
}, 120_000);

it('a run and its workers stop in good order, and go on', async () => {
  await using site = await cluster(0);
  const worker = site.machines.start('--grace', '0');
  const asked = ['--clusters', '1', '--sparsity', '0.25', '--quick', '--name', 'small'];
  const learning = ['learn', '--model', 'tiny', '--data', ...data, '--rows', '12', ...asked, '--out'];
  const queue = ['--queue', site.server.url, '--journal', site.journal];
  const first = startCommand(tiny.home, [...learning, join(folder, 'stopped'), ...queue]);
  await soon(() => worker.computed.length > 30);
  first.child.kill('SIGINT');
  expect(await first.ended).toBe(130);
  expect(first.said()).toMatch(/Stopped\.\n$/);
  // It takes back what no worker has begun.
  expect(await site.machines.redis.llen('bull:maskroute-units:wait')).toBe(0);
  expect(readdirSync(join(folder, 'stopped'))).toEqual(['.lock', 'state.jsonl']);

  // A worker that is told to stop gives a long unit back.
  const long = longUnit(2, 6);
  const queued = await site.open({ ...run, model: tiny.model });
  const found = queued.run(long);
  await soon(() => site.machines.isComputing(worker));
  worker.child.kill('SIGINT');
  expect(await worker.ended).toBe(0);
  site.machines.start();
  expect(await found).toEqual((await computedHere([long]))[0]);
  await queued[Symbol.asyncDispose]();

  const second = startCommand(tiny.home, [...learning, join(folder, 'stopped'), ...queue]);
  expect([await second.ended, second.said().includes('error')]).toEqual([0, false]);
  const alone = await saidInProcess({ MASKROUTE_HOME: tiny.home }, [
    ...learning,
    join(folder, 'not-stopped'),
  ]);
  expect(alone.status, alone.stderr).toBe(0);
  expect(bytesOf('stopped')).toEqual(bytesOf('not-stopped'));
  expect(site.machines.twice()).toEqual([]);
}, 300_000);

it('a run and its workers end when they are told to while the queue is away', async () => {
  await using site = await cluster(0);
  const worker = site.machines.start('--grace', '0');
  const asked = ['--clusters', '1', '--sparsity', '0.25', '--quick', '--out', join(folder, 'cut-off')];
  const queue = ['--queue', site.server.url, '--journal', site.journal];
  const run = startCommand(tiny.home, ['learn', '--model', 'tiny', '--data', ...data, ...asked, ...queue]);
  await soon(() => worker.computed.length > 10);
  await site.server.stop();
  await soon(() => [run, worker].every(({ said }) => said().includes('is unreachable')));
  const ends: Record<string, number | string> = {};
  for (const [name, { child, ended }] of Object.entries({ run, worker })) {
    child.kill('SIGINT');
    void ended.then((code) => {
      ends[name] = code;
    });
  }
  await soon(() => Object.keys(ends).length === 2).catch(() => run.child.kill('SIGKILL'));
  expect(ends).toEqual({ run: 130, worker: 0 });
  expect(run.said()).toMatch(/Stopped\.\n$/);
}, 120_000);

it('a job of a schedule is cancelled while the queue is away, in mid-run and before it begins', async () => {
  await using site = await cluster(1);
  const [worker] = site.machines.all;
  await using open = new AsyncDisposableStack();
  open.defer(() => void vi.unstubAllEnvs());
  vi.stubEnv('MASKROUTE_QUEUE', site.server.url);
  vi.stubEnv('MASKROUTE_JOURNAL', site.journal);
  const options = {
    home: tiny.home,
    model: 'tiny',
    backendKeys: ['a-backend-key-of-the-tests'] as const,
    dataFolder: join(folder, 'data'),
    note: () => {},
  };
  const jobs = (await openJobs({ ...options, entry: cli }))!;
  open.defer(() => jobs.close());
  const schedules = await openSchedules(options, jobs);
  open.defer(() => schedules.close());
  const job = { kind: 'learn', data: [{ path: 'sums.jsonl' }], clusters: 1, sparsity: 0.25 };
  const begin = async () => {
    await schedules.create(
      createScheduleSchema.parse({ every: '24h', first_at: new Date().toISOString(), job }),
    );
    await soon(() => jobs.list()[0]?.status === 'running');
    return jobs.list()[0]!.id;
  };
  const isAway = (id: string) => {
    const log = join(tiny.home, 'jobs', id, 'log.txt');
    return existsSync(log) && readFileSync(log, 'utf8').includes('is unreachable');
  };

  const learning = await begin();
  await soon(() => worker!.computed.length > 10);
  await site.server.stop();
  await soon(() => isAway(learning));
  expect(await jobs.cancel(learning)).toMatchObject({ status: 'cancelled', error: null });

  const waiting = await begin();
  await soon(() => isAway(waiting));
  expect(await jobs.cancel(waiting)).toMatchObject({ status: 'cancelled', error: null });
}, 300_000);

it('a thread that is closed in mid-unit leaves its process alive', () => {
  const program = join(import.meta.dirname, 'close-in-mid-unit.ts');
  const args = [program, tiny.home, tiny.model.manifest.name, JSON.stringify(longUnit(1))];
  const { status, signal, stdout } = spawnSync(process.execPath, args, { encoding: 'utf8' });
  expect([status, signal]).toEqual([0, null]);
  // A unit of one run of the graph is computed by the time that its thread ends.
  expect(stdout.match(/computed|it was closed/g)).toHaveLength(3);
});

it('a model that could not be opened for one unit is opened for the next', async () => {
  using other = await tinyHome();
  await using units = await openLocalUnits({ ...run, model: other.model });
  const weights = join(other.model.folder, 'weights.bin');
  renameSync(weights, `${weights}.away`);
  await expect(units.run(longUnit(1, 1))).rejects.toThrow();
  renameSync(`${weights}.away`, weights);
  expect(await units.run(longUnit(1, 1))).toEqual((await computedHere([longUnit(1, 1)]))[0]);
});

it('two that ask at once for a unit that the journal has both get its numbers, or both the error', async () => {
  await using site = await cluster(0);
  await using queued = await site.open({ ...run, model: tiny.model });
  const [known, unreadable] = [longUnit(1), longUnit(2)];
  const nameOf = (unit: BatchUnit) => unitName(workOf(tiny.model, undefined, 'blocks'), unit);
  const journal = await openUnitJournal(site.journal, () => {});
  await journal.write(nameOf(known), [1, 2]);
  expect(await Promise.all([queued.run(known), queued.run(known)])).toEqual([
    [1, 2],
    [1, 2],
  ]);

  const name = nameOf(unreadable);
  mkdirSync(join(site.journal, name.slice(0, 2), `${name}.json`), { recursive: true });
  const failed = await Promise.allSettled([queued.run(unreadable), queued.run(unreadable)]);
  expect(failed).toMatchObject(Array(2).fill({ status: 'rejected', reason: { code: 'EISDIR' } }));

  // The same when the queue says that a worker has computed it.
  const later = nameOf(longUnit(3));
  const found = queued.run(longUnit(3));
  found.catch(() => {});
  await soon(async () => (await site.machines.redis.exists(`bull:maskroute-units:${later}`)) > 0);
  mkdirSync(join(site.journal, later.slice(0, 2), `${later}.json`), { recursive: true });
  const event = ['event', 'completed', 'jobId', later, 'returnvalue', 'null'];
  await site.machines.redis.xadd('bull:maskroute-units:events', '*', ...event);
  await expect(found).rejects.toMatchObject({ code: 'EISDIR' });
}, 60_000);

it('a run and its worker wait for a queue without memory, and for a silent one, which holds up no stop', async () => {
  const silent_ms = 3000;
  await using site = await cluster(1, { silent_ms });
  const queued = await site.open({ ...run, model: tiny.model });
  const { redis } = site.machines;
  await redis.config('SET', 'maxmemory', '1');
  const found = queued.run(longUnit(5, 1));
  await soon(() => site.said.some((line) => /takes no units for now \(OOM .*waiting for it/.test(line)));
  await redis.config('SET', 'maxmemory', '0');
  expect(await found).toEqual((await computedHere([longUnit(5, 1)]))[0]);
  await soon(() => site.said.includes('The queue takes units again.'));

  const pid = Number(/process_id:(\d+)/.exec(await redis.info('server'))![1]);
  const stop = new AbortController();
  const stopped = await site.open({ ...run, model: tiny.model, signal: stop.signal });
  process.kill(pid, 'SIGSTOP');
  const lost = stopped.run(longUnit(6, 1));
  lost.catch(() => {});
  await soon(() => site.said.some((line) => line.includes('is unreachable (no answer for 3 s)')));
  const start_ms = performance.now();
  stop.abort(new Error('enough'));
  await expect(lost).rejects.toThrow('enough');
  await stopped[Symbol.asyncDispose]();
  expect(performance.now() - start_ms).toBeLessThan(silent_ms);
  process.kill(pid, 'SIGCONT');
  expect(await queued.run(longUnit(7, 1))).toEqual((await computedHere([longUnit(7, 1)]))[0]);
  await queued[Symbol.asyncDispose]();
}, 300_000);

it.each([
  ['q4', 'fourBits'],
  ['q8-columns', 'columns'],
] as const)('a model in %s that was calibrated on another text is another model', (weights, field) => {
  const calibratedOn = (text: string) => {
    const manifest = { ...tiny.model.manifest, weights, [field]: { version: 1, text } };
    return workOf({ ...tiny.model, manifest }, undefined, 'blocks');
  };
  const [one, other] = [calibratedOn('data 1'), calibratedOn('data 2')];
  expect([sameWork(one, one), sameWork(one, other)]).toEqual([true, false]);
  expect(unitName(one, longUnit(1))).not.toBe(unitName(other, longUnit(1)));
  expect(workSchema.parse(JSON.parse(JSON.stringify(one)))).toEqual(one);
  expect(describeWork(one)).toBe(
    `tiny (${weights} by data 1, aaaaaaaaaaaa, no surrogates, rounding in blocks), version ${one.version}`,
  );
});

it('a model in fp32 is rounded nowhere: what a run computed serves the others, wherever they began', () => {
  const [inBlocks, inPairs] = (['blocks', 'pairs'] as const).map((rounding) =>
    workOf(tiny.model, undefined, rounding),
  );
  expect(unitName(inPairs!, longUnit(1))).toBe(unitName(inBlocks!, longUnit(1)));
  expect(describeWork(inPairs!)).toMatch(/^tiny \(f32, [0-9a-f]{12}, no surrogates\), version /);
});

it('two kinds of work do not share a queue at a time: the second run waits for the first', async () => {
  await using site = await cluster(0);
  const first = await site.open({ ...run, model: tiny.model });
  const stop = new AbortController();
  const manifest = { ...tiny.model.manifest, hash: 'c'.repeat(64) as ModelHash };
  const second = site.open({ ...run, model: { ...tiny.model, manifest }, signal: stop.signal });
  second.catch(() => {});
  await soon(() => site.said.some((line) => line.includes('The queue is in use')));
  stop.abort(new Error('enough'));
  await expect(second).rejects.toThrow('enough');
  await first[Symbol.asyncDispose]();
}, 60_000);
