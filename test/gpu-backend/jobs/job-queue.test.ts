/** Jobs as such: their line, their end by every cause, restarts, secrets, data. What they run is scripted here. */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { constants, getPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, onTestFinished, vi } from 'vitest';
import { openHomeJobs } from '../../../gpu-backend/jobs/home-jobs.ts';
import { JobData } from '../../../gpu-backend/jobs/job-data.ts';
import { Jobs, openJobs } from '../../../gpu-backend/jobs/job-queue.ts';
import { createJobStore, seal, unseal } from '../../../gpu-backend/jobs/job-store.ts';
import { learnArguments } from '../../../gpu-backend/jobs/run-command.ts';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { type CreateJob, isFinished, type Job, type JobRequest } from '../../../shared/admin/job-wire.ts';
import { installTinyModel } from '../../support/tiny-model.ts';
import { eventually } from '../api/harness.ts';
import { startJobsEdge } from './fixtures/edge.ts';

const PRESET = 'gpu-backend/presets/smollm2-135m-instruct/mask-set.json';
const KEY = 'a-backend-key-of-the-tests';
const ADMIN_KEY = 'an-admin-key-that-nobody-may-read';
const entry = fileURLToPath(new URL('./fixtures/command.ts', import.meta.url));

let edge: Awaited<ReturnType<typeof startJobsEdge>>;
beforeAll(async () => {
  edge = await startJobsEdge();
});
afterAll(() => edge.close());

let home = '';
const open: Jobs[] = [];
let notes = '';
beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), 'maskroute-jobs-'));
  notes = '';
  edge.says();
});
afterEach(async () => {
  for (const jobs of open.splice(0)) await jobs.close();
  rmSync(home, { recursive: true, force: true });
});

const options = () => ({
  home,
  model: 'served',
  backendKeys: [KEY] as const,
  entry,
  dataFolder: undefined,
  note(message: string, detail: Record<string, unknown>) {
    notes += `${message} ${JSON.stringify(detail)}\n`;
  },
});
async function start(dataFolder?: string, cancelWait_ms?: number): Promise<Jobs> {
  const jobs = (await openJobs({ ...options(), dataFolder, cancelWait_ms }))!;
  open.push(jobs);
  return jobs;
}

/** What `openJobs` gives to jobs, for a test that replaces some of it. */
const parts = () => ({
  store: createJobStore(join(home, 'jobs'), options().note),
  data: new JobData(join(home, 'jobs', 'data'), undefined),
});

const streamOf = (text: string) => new Blob([text]).stream();
async function request(jobs: Jobs, behaviour: string, more: Partial<CreateJob> = {}): Promise<CreateJob> {
  const { data } = await jobs.data.add(behaviour, streamOf('{"text": "x"}\n'));
  return {
    kind: 'learn',
    data: [{ upload: data.id }],
    clusters: 2,
    sparsity: 0.1,
    encoder: 'static',
    ...more,
  };
}
const create = async (jobs: Jobs, behaviour: string, more?: Partial<CreateJob>) =>
  await jobs.create(await request(jobs, behaviour, more));
const ended = (jobs: Jobs, id: string) => eventually(() => isFinished(jobs.get(id)), 15_000);
const folderOf = (id: string) => join(home, 'jobs', id);
const starts = (id: string) =>
  existsSync(join(folderOf(id), 'starts'))
    ? readFileSync(join(folderOf(id), 'starts'), 'utf8')
        .trim()
        .split('\n')
    : [];
const published = (id: string): { args: string[]; key: string } =>
  JSON.parse(readFileSync(join(folderOf(id), 'published.json'), 'utf8'));
/** The open folder with a file of one row. */
function openFolder(name: string) {
  const folder = join(home, 'open');
  const file = join(folder, name);
  mkdirSync(folder);
  const row = '{"text": "x"}\n';
  writeFileSync(file, row);
  return {
    folder,
    /** Adds zeros, which take no room on the disk: nobody hashes them in half a minute. */
    makeHuge: () => truncateSync(file, 2 ** 36),
    shrink: () => truncateSync(file, row.length),
  };
}
const hangs = (id: string) => eventually(() => existsSync(join(folderOf(id), 'out', 'step-2')), 15_000);

describe('a job', () => {
  it('runs to its end, tells of its progress, and leaves a mask set', async () => {
    const jobs = await start();
    const { id, status, request: asked } = await create(jobs, 'ok');
    expect([status, asked.model]).toEqual(['waiting', 'served']);
    const seen: Job[] = [];
    for await (const job of jobs.follow(id, new AbortController().signal)) seen.push(job);
    expect(seen[0]!.status).not.toBe('succeeded');
    expect(seen.at(-1)).toMatchObject({ status: 'succeeded', starts: 1, error: null, progress: null });
    expect(seen.at(-1)!.result).toMatchObject({ version: expect.stringMatching(/^v_/), published: null });
    expect(seen.some(({ progress }) => progress?.stage === 'search')).toBe(true);
    expect(JSON.parse(await jobs.read(id, 'mask-set.json'))).toHaveProperty('clusters');
  });

  it('that fails says why', async () => {
    const jobs = await start();
    const { id } = await create(jobs, 'fail');
    await ended(jobs, id);
    expect(jobs.get(id)).toMatchObject({
      status: 'failed',
      error: expect.stringContaining('The data is of no use.'),
    });
    await expect(jobs.read(id, 'mask-set.json')).rejects.toMatchObject({ code: 'conflict' });
    expect(readFileSync(join(folderOf(id), 'log.txt'), 'utf8')).toContain('of no use');
  });

  it('goes on from what an equal one had computed when it was killed or cancelled', async () => {
    const jobs = await start();
    const killed = await create(jobs, 'hang');
    await hangs(killed.id);
    process.kill(Number(starts(killed.id)[0]), 'SIGKILL');
    await ended(jobs, killed.id);
    const other = await create(jobs, 'hang', { sparsity: 0.2 });
    await hangs(other.id);
    await jobs.cancel(other.id);
    // The first two of four steps are done. Where the set is published does not matter to learning.
    const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
    for (const more of [{ publish }, { sparsity: 0.2 }]) {
      const { id } = await create(jobs, 'hang', more);
      await ended(jobs, id);
      expect(jobs.get(id)).toMatchObject({ status: 'succeeded', starts: 1 });
    }
    expect(notes).toContain(`"earlier":"${killed.id}"`);
    expect(notes).toContain(`"earlier":"${other.id}"`);
  });

  it('goes on from a part of an equal one without reading its data first: only a whole set says what it was learned from', async () => {
    const { folder, makeHuge, shrink } = openFolder('hang.jsonl');
    let goesOn = false;
    const note = (message: string) => {
      if (message !== 'a job goes on from an equal one') return;
      shrink();
      goesOn = true;
    };
    const jobs = (await openJobs({ ...options(), dataFolder: folder, note }))!;
    open.push(jobs);
    const asked = { data: [{ path: 'hang.jsonl' }] };
    const first = await create(jobs, 'hang', asked);
    await hangs(first.id);
    await jobs.cancel(first.id);
    makeHuge();
    const { id } = await create(jobs, 'hang', asked);
    await eventually(() => goesOn, 10_000);
    await ended(jobs, id);
    expect(jobs.get(id).status).toBe('succeeded');
  });

  it('is cancelled, and a backend stops, while it reads data to find out whether an equal one learned from them', async () => {
    const { folder, makeHuge, shrink } = openFolder('ok.jsonl');
    const publish = { edge: edge.url, tenant: 'refused', activate: true, admin_key: ADMIN_KEY };
    const jobs = await start(folder);
    const asked = { data: [{ path: 'ok.jsonl' }], publish };
    const first = await create(jobs, 'ok', asked);
    await ended(jobs, first.id);
    expect(jobs.get(first.id).status).toBe('failed');
    makeHuge();
    const begin = async () => {
      const { id } = await create(jobs, 'ok', asked);
      await eventually(() => jobs.get(id).status === 'running');
      // It asks the edge first.
      await sleep(500);
      return id;
    };
    expect(await jobs.cancel(await begin())).toMatchObject({ status: 'cancelled', error: null });
    const id = await begin();
    await jobs.close();
    expect(jobs.get(id)).toMatchObject({ status: 'running', error: null });
    // The next start finds out.
    shrink();
    await ended(await start(folder), id);
    expect(notes).toContain(`"job":"${id}","earlier":"${first.id}"`);
  });

  it('leads a group of its own, so that a Ctrl-C in the terminal of its backend does not end it', async () => {
    const jobs = await start();
    const { id } = await create(jobs, 'hang');
    await hangs(id);
    const pid = Number(starts(id)[0]);
    process.kill(-pid, 0);
    // Serving goes first.
    expect(getPriority(pid)).toBe(constants.priority.PRIORITY_LOW);
  });

  it('runs alone; a few wait, and more are refused', async () => {
    const jobs = await start();
    const first = await create(jobs, 'hang');
    await hangs(first.id);
    const asked = await request(jobs, 'ok');
    const waiting = await Promise.allSettled(Array.from({ length: 10 }, () => jobs.create(asked)));
    const made = waiting.filter((result) => result.status === 'fulfilled').map(({ value }) => value);
    expect(made).toHaveLength(8);
    expect(waiting.find((result) => result.status === 'rejected')!.reason).toMatchObject({
      code: 'queue_full',
    });
    expect(made.map(({ id }) => jobs.get(id).status)).toEqual(Array(8).fill('waiting'));
    for (const { id } of made.slice(1)) expect((await jobs.cancel(id)).status).toBe('cancelled');
    expect((await jobs.cancel(first.id)).status).toBe('cancelled');
    expect((await jobs.cancel(first.id)).status).toBe('cancelled');
    await ended(jobs, made[0]!.id);
    expect(jobs.get(made[0]!.id).status).toBe('succeeded');
    expect(starts(made[1]!.id)).toEqual([]);
  });

  it('that is cancelled in the moment when its turn comes does not run', async () => {
    const folder = join(home, 'jobs');
    const store = createJobStore(folder, options().note);
    let saving: Promise<unknown> = Promise.resolve();
    const firstEnds = Promise.withResolvers<void>();
    const save = (job: Job) => {
      if (job.status === 'succeeded') firstEnds.resolve();
      const saved = saving.then(() => sleep(100)).then(() => store.save(job));
      saving = saved;
      return saved;
    };
    const jobs = new Jobs(
      { home, model: 'served', backendKeys: [KEY] as const, entry, dataFolder: undefined, note: () => {} },
      { ...store, save },
      new JobData(join(folder, 'data'), undefined),
      [],
    );
    open.push(jobs);
    await create(jobs, 'ok');
    const { id } = await create(jobs, 'ok');
    await firstEnds.promise;
    expect(await jobs.cancel(id)).toMatchObject({ status: 'cancelled' });
    await sleep(500);
    expect(jobs.get(id)).toMatchObject({ status: 'cancelled', starts: 0 });
    expect(starts(id)).toEqual([]);
  });

  it('begins with the set that an earlier job learned: a certain one, or the last of its kind', async () => {
    const jobs = await start();
    const from = async (more: Partial<CreateJob>) => {
      const { id } = await create(jobs, 'ok', more);
      await ended(jobs, id);
      const args = readFileSync(join(folderOf(id), 'arguments'), 'utf8').split('\n');
      return { id, set: args.includes('--from') ? args[args.indexOf('--from') + 1] : undefined };
    };
    const setOf = (id: string) => join(folderOf(id), 'out', 'mask-set.json');
    // There is none before it.
    const first = await from({ from: 'last' });
    expect(first.set).toBeUndefined();
    const second = await from({ from: 'last' });
    expect(second.set).toBe(setOf(first.id));
    // An equal job that has learned keeps what it learned.
    expect(existsSync(setOf(first.id))).toBe(true);
    expect((await from({ from: first.id })).set).toBe(setOf(first.id));
    for (const other of [
      { sparsity: 0.2 },
      { name: 'other' },
      { cost: 'time' as const },
      { surrogate: false },
      { model: 'other' },
    ])
      expect((await from({ from: 'last', ...other })).set).toBeUndefined();
    const context = { cost: 'time', context: 2000 } as const;
    expect((await from({ from: 'last', ...context })).set).toBeUndefined();
    expect((await from({ from: 'last', ...context })).set).toBeDefined();
    await expect(create(jobs, 'ok', { from: first.id, ...context })).rejects.toMatchObject({
      code: 'invalid_request',
      message: expect.stringContaining('context does nothing beside from'),
    });
    await expect(create(jobs, 'ok', { from: `job_${'0'.repeat(24)}` })).rejects.toMatchObject({
      code: 'not_found',
    });
    const failed = await create(jobs, 'fail');
    await ended(jobs, failed.id);
    await expect(create(jobs, 'ok', { from: failed.id })).rejects.toMatchObject({ code: 'conflict' });
  }, 60_000);

  it('searches again once other weights are installed, or surrogates where none were', async () => {
    const { model, surrogates } = await readMaskSet(PRESET);
    const folder = join(home, 'models', 'served');
    const { manifest } = await installTinyModel(folder, 'f32');
    const install = (changes: object) =>
      writeFileSync(join(folder, 'model.json'), JSON.stringify({ ...manifest, ...changes }));
    const table = { surrogates: { id: surrogates!, rank: 64, fitted: 'closed form', preset: true } };
    const jobs = await start();
    const beginsWithSet = async (more?: Partial<CreateJob>) => {
      const { id } = await create(jobs, 'ok', { from: 'last', ...more });
      await ended(jobs, id);
      return readFileSync(join(folderOf(id), 'arguments'), 'utf8').includes('--from');
    };
    install({ hash: model.hash, ...table });
    expect([await beginsWithSet(), await beginsWithSet()]).toEqual([false, true]);
    install({ hash: model.hash });
    expect(await beginsWithSet()).toBe(false);
    install({ hash: manifest.hash, ...table });
    expect(await beginsWithSet()).toBe(false);
    install({ hash: model.hash, ...table });
    expect(await beginsWithSet()).toBe(true);
    install({
      hash: model.hash,
      surrogates: { ...table.surrogates, id: `s_${'1'.repeat(24)}` },
    });
    expect(await beginsWithSet()).toBe(true);
    expect([await beginsWithSet({ surrogate: false }), await beginsWithSet({ surrogate: false })]).toEqual([
      false,
      false,
    ]);
  }, 60_000);

  it('keeps what others begin with, however many fail after it', async () => {
    const jobs = await start();
    const { id, request: asked } = await create(jobs, 'ok');
    await ended(jobs, id);
    for (let i = 0; i < 60; i++) await jobs.createFailed(asked, `schedule_${'0'.repeat(24)}`, 'no data');
    expect(jobs.list()).toHaveLength(51);
    expect(jobs.list().at(-1)).toMatchObject({ id, status: 'succeeded' });
    expect(JSON.parse(await jobs.read(id, 'mask-set.json'))).toHaveProperty('clusters');
  });

  it('begins all the same where the disk keeps an older one, which the log says', async () => {
    const { store, data } = parts();
    const remove = () => Promise.reject(new Error('the disk is read-only'));
    const jobs = new Jobs(options(), { ...store, remove }, data, []);
    open.push(jobs);
    const { id, request: asked } = await create(jobs, 'fail');
    await ended(jobs, id);
    for (let i = 0; i < 50; i++) await jobs.createFailed(asked, `schedule_${'0'.repeat(24)}`, 'no data');
    expect(jobs.list()).toHaveLength(50);
    expect(notes).toContain(`an old job was not deleted {"job":"${id}","reason":"the disk is read-only"}`);
    const next = await create(jobs, 'ok');
    await ended(jobs, next.id);
    expect(jobs.get(next.id).status).toBe('succeeded');
  });

  it('gives each a number of its own, also to those that fail while others are created', async () => {
    const jobs = await start();
    const { request: asked } = await create(jobs, 'hang');
    const failing = () => jobs.createFailed(asked, `schedule_${'0'.repeat(24)}`, 'no data');
    await Promise.all([create(jobs, 'good'), failing(), failing()]);
    expect(jobs.list().map(({ number }) => number)).toEqual([4, 3, 2, 1]);
  });

  it('keeps what a waiting one begins with, though it did not succeed itself', async () => {
    const jobs = await start();
    const publish = { edge: edge.url, tenant: 'hang', activate: true, admin_key: ADMIN_KEY };
    const learned = await create(jobs, 'ok', { publish });
    await eventually(() => existsSync(join(folderOf(learned.id), 'published.json')), 15_000);
    await jobs.cancel(learned.id);
    const running = await create(jobs, 'hang');
    const waiting = await create(jobs, 'ok', { from: learned.id });
    for (let i = 0; i < 60; i++)
      await jobs.createFailed(running.request, `schedule_${'0'.repeat(24)}`, 'no data');
    expect(JSON.parse(await jobs.read(learned.id, 'mask-set.json'))).toHaveProperty('clusters');
    await jobs.cancel(running.id);
    await ended(jobs, waiting.id);
    expect(jobs.get(waiting.id).status).toBe('succeeded');
  });

  it('refuses data that is not there before it begins', async () => {
    const jobs = await start();
    const asked = await request(jobs, 'ok');
    const missing = { ...asked, data: [{ upload: `data_${'0'.repeat(24)}` }] };
    await expect(jobs.create(missing)).rejects.toMatchObject({ code: 'not_found' });
    await expect(jobs.create({ ...asked, data: [{ path: 'x.jsonl' }] })).rejects.toMatchObject({
      code: 'forbidden',
    });
    expect(jobs.list()).toEqual([]);
    expect(() => jobs.get('job_x')).toThrow('There is no job');
  });
});

it('a job of a schedule does not bring back a set that an earlier one published and that was rolled back', async () => {
  const jobs = await start();
  const publish = { edge: edge.url, tenant: 'acme', activate: true, admin_key: ADMIN_KEY };
  const { id } = await jobs.create(await request(jobs, 'ok', { publish }), 'schedule_1');
  await ended(jobs, id);
  expect(published(id).args).toContain('--unless-rolled-back');
});

describe('a restart', () => {
  it('in good order stops the job, and the next start goes on with it', async () => {
    const first = await start();
    const { id } = await create(first, 'hang');
    const waiting = await create(first, 'ok');
    await hangs(id);
    const { started_at } = first.get(id);
    await first.close();
    expect(() => process.kill(Number(starts(id)[0]), 0)).toThrow();
    const second = await start();
    expect(second.list().map((job) => job.id)).toEqual([waiting.id, id]);
    await ended(second, id);
    await ended(second, waiting.id);
    expect(second.get(id)).toMatchObject({ status: 'succeeded', starts: 2, started_at });
    expect(second.get(waiting.id)).toMatchObject({ status: 'succeeded', starts: 1 });
  });

  it('of a job that publishes does not learn again, and needs its data no more', async () => {
    const first = await start();
    const publish = { edge: edge.url, tenant: 'hang', activate: true, admin_key: ADMIN_KEY };
    const { id, request: asked } = await create(first, 'ok', { publish });
    await eventually(() => existsSync(join(folderOf(id), 'published.json')), 15_000);
    const { args } = published(id);
    expect(args.slice(-2)).toEqual(['--once', join(folderOf(id), 'first-try.json')]);
    await first.close();
    rmSync(join(home, 'jobs', 'data'), { recursive: true });
    const second = await start();
    await ended(second, id);
    expect(second.get(id)).toMatchObject({ status: 'succeeded', starts: 2, request: asked });
    // Learned once, published twice in the same way: the file tells what the first had done.
    expect(starts(id)).toHaveLength(3);
    expect(published(id).args).toEqual(args);
  });

  it('removes the secret of a job that had just ended', async () => {
    const first = await start();
    const { id } = await create(first, 'ok');
    await ended(first, id);
    await first.close();
    writeFileSync(join(folderOf(id), 'secret'), seal(ADMIN_KEY, KEY, id));
    await start();
    expect(existsSync(join(folderOf(id), 'secret'))).toBe(false);
  });

  it('keeps the order in which jobs came, though the clock was set back between them', async () => {
    const first = await start();
    const running = await create(first, 'hang');
    const waiting = await create(first, 'good');
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() - 86_400_000 });
    onTestFinished(() => void vi.useRealTimers());
    const last = await create(first, 'good', { clusters: 3 });
    const ids = [last.id, waiting.id, running.id];
    expect(first.list().map(({ id }) => id)).toEqual(ids);
    await first.close();
    expect((await start()).list().map(({ id }) => id)).toEqual(ids);
  });

  it('that takes its time to end does not hold up who cancels it', async () => {
    const jobs = await start(undefined, 50);
    const { id } = await create(jobs, 'linger');
    await hangs(id);
    expect(await jobs.cancel(id)).toMatchObject({ status: 'running' });
    await ended(jobs, id);
    expect(jobs.get(id)).toMatchObject({ status: 'cancelled' });
  });

  it('while a cancelled job takes its time to end does not begin it again', async () => {
    const first = await start(undefined, 50);
    const { id } = await create(first, 'linger');
    await hangs(id);
    expect(await first.cancel(id)).toMatchObject({ status: 'running' });
    await first.close();
    const second = await start();
    expect(second.get(id)).toMatchObject({ status: 'cancelled', starts: 1 });
  });

  it('after a kill of the command alone is a failure that names the signal', async () => {
    const jobs = await start();
    const { id } = await create(jobs, 'hang');
    await hangs(id);
    process.kill(Number(starts(id)[0]), 'SIGKILL');
    await ended(jobs, id);
    expect(jobs.get(id)).toMatchObject({ status: 'failed', error: expect.stringContaining('SIGKILL') });
  });

  it('passes over a folder that holds no job', async () => {
    const first = await start();
    const { id } = await create(first, 'ok');
    await ended(first, id);
    await first.close();
    mkdirSync(folderOf(`job_${'1'.repeat(24)}`));
    writeFileSync(join(folderOf(`job_${'1'.repeat(24)}`), 'job.json'), '{"half": ');
    expect((await start()).list().map((job) => job.id)).toEqual([id]);
  });

  it('keeps what was learned where the disk does not give a job', async () => {
    const first = await start();
    const { id } = await create(first, 'ok');
    await ended(first, id);
    await first.close();
    const file = join(folderOf(id), 'job.json');
    rmSync(file);
    symlinkSync(file, file);
    await expect(start()).rejects.toMatchObject({ code: 'ELOOP' });
    expect(existsSync(join(folderOf(id), 'out', 'mask-set.json'))).toBe(true);
  });

  it('removes what a kill left of a job that nobody was told of, and its secret', async () => {
    const cut = folderOf(`job_${'2'.repeat(24)}`);
    mkdirSync(cut, { recursive: true });
    writeFileSync(join(cut, 'secret'), seal(ADMIN_KEY, KEY, 'job'));
    expect((await start()).list()).toEqual([]);
    expect(existsSync(cut)).toBe(false);
  });
});

describe('publishing', () => {
  it('uses the admin key once and shows it to nobody', async () => {
    const jobs = await start();
    const publish = { edge: edge.url, tenant: 'acme', activate: true, admin_key: ADMIN_KEY };
    const job = await create(jobs, 'ok', { publish });
    const { id } = job;
    expect(job.request.publish).toEqual({ edge: edge.url, tenant: 'acme', activate: true });
    const secret = readFileSync(join(folderOf(id), 'secret'));
    expect(secret.includes(ADMIN_KEY)).toBe(false);
    await ended(jobs, id);
    expect(jobs.get(id).result!.published).toContain('live at the edge');
    const { args, key } = published(id);
    expect(key).toBe(ADMIN_KEY);
    const once = ['--once', join(folderOf(id), 'first-try.json')];
    expect(args.slice(1)).toEqual(['--edge', edge.url, '--tenant', 'acme', '--activate', ...once]);
    rmSync(join(folderOf(id), 'published.json'));
    for (const file of readdirSync(folderOf(id), { withFileTypes: true })) {
      if (file.isFile())
        expect(readFileSync(join(folderOf(id), file.name)).includes(ADMIN_KEY), file.name).toBe(false);
    }
    expect(existsSync(join(folderOf(id), 'secret'))).toBe(false);
    expect(notes + JSON.stringify(jobs.list())).not.toContain(ADMIN_KEY);
  });

  it('is one backend’s: another one with the same home gets none before the first is closed', async () => {
    const first = await start();
    const { id } = await create(first, 'hang');
    await hangs(id);
    expect(await openJobs(options())).toBeUndefined();
    expect(starts(id)).toHaveLength(1);
    expect(first.get(id).status).toBe('running');
    // The backend drains: what it is still asked changes the same folders.
    await first.stop();
    expect(await openJobs(options())).toBeUndefined();
    for (let i = 0; i < 2; i++) await first.close();
    const second = await start();
    await eventually(() => starts(id).length === 2, 15_000);
    await second.cancel(id);
  });

  it('is taken over by another backend of the home when the one that has it is gone', async () => {
    const first = await start();
    const { id } = await create(first, 'hang');
    await hangs(id);
    const reasons: string[] = [];
    const second = await openHomeJobs({
      ...options(),
      warn: (reason: string) => reasons.push(reason),
      retry_ms: 50,
    });
    await sleep(200);
    expect(second.held).toBeUndefined();
    expect(reasons).toEqual([expect.stringContaining('another backend with this MASKROUTE_HOME')]);
    await first.close();
    await eventually(() => second.held !== undefined, 15_000);
    await eventually(() => starts(id).length === 2, 15_000);
    await second.held!.jobs.cancel(id);
    expect(second.held!.schedules.list()).toEqual([]);
    await second.close();
  });

  it('that waits for another backend’s end can itself end', async () => {
    const first = await start();
    const second = await openHomeJobs({ ...options(), warn: () => {} });
    await second.close();
    await first.close();
    expect(second.held).toBeUndefined();
  });

  it('keeps its secret where the disk does not take its end, for the next start', async () => {
    const { store, data } = parts();
    const save = (job: Job) =>
      isFinished(job) ? Promise.reject(new Error('the disk is full')) : store.save(job);
    const jobs = new Jobs(options(), { ...store, save }, data, []);
    const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
    const { id } = await create(jobs, 'ok', { publish });
    await ended(jobs, id);
    await jobs.close();
    const next = await start();
    await ended(next, id);
    expect(next.get(id)).toMatchObject({ status: 'succeeded', starts: 2 });
  });

  it('has succeeded, also where its secret cannot be deleted, which the log says at every start', async () => {
    const jobs = await start();
    const { id } = await create(jobs, 'ok');
    mkdirSync(join(folderOf(id), 'secret'));
    await ended(jobs, id);
    expect(jobs.get(id)).toMatchObject({ status: 'succeeded', error: null });
    expect(notes).toContain('the secret of an ended job was not deleted');
    await jobs.close();
    notes = '';
    expect((await start()).get(id)).toMatchObject({ status: 'succeeded' });
    expect(notes).toContain('the secret of an ended job was not deleted');
  });

  it('leaves no secret of a job that the disk does not take', async () => {
    const { store, data } = parts();
    const full = { ...store, save: () => Promise.reject(new Error('the disk is full')) };
    const jobs = new Jobs(options(), full, data, []);
    const publish = { edge: edge.url, tenant: 'acme', activate: true, admin_key: ADMIN_KEY };
    await expect(create(jobs, 'ok', { publish })).rejects.toThrow('the disk is full');
    expect(readdirSync(join(home, 'jobs'))).toEqual(['data']);
  });

  it('that is cancelled may have happened, which the job says', async () => {
    const jobs = await start();
    const publish = { edge: edge.url, tenant: 'hang', activate: true, admin_key: ADMIN_KEY };
    const { id } = await create(jobs, 'ok', { publish });
    await eventually(() => existsSync(join(folderOf(id), 'published.json')), 15_000);
    expect(await jobs.cancel(id)).toMatchObject({
      status: 'cancelled',
      error: expect.stringContaining('look at the edge'),
      result: { version: expect.stringMatching(/^v_/), published: null },
    });
    expect(existsSync(join(folderOf(id), 'secret'))).toBe(false);
    for (const behaviour of ['hang', 'late']) {
      const learning = await create(jobs, behaviour, { publish });
      await hangs(learning.id);
      expect(await jobs.cancel(learning.id)).toMatchObject({
        status: 'cancelled',
        error: null,
        result: null,
      });
      expect(existsSync(join(folderOf(learning.id), 'published.json'))).toBe(false);
    }
  });

  describe('where it failed', () => {
    const to = (tenant: string) => ({
      publish: { edge: edge.url, tenant, activate: true, admin_key: ADMIN_KEY },
    });
    const writeData = (text: string) =>
      writeFileSync(join(home, 'open', 'ok.jsonl'), `{"text": "${text}"}\n`);
    /** An equal job's commands, after a job that learned and did not publish. A single command only publishes. */
    async function startsAfter(change: (learned: Job) => unknown) {
      const folder = join(home, 'open');
      mkdirSync(folder);
      writeData('x');
      const jobs = await start(folder);
      const asked: Partial<CreateJob> = { data: [{ path: 'ok.jsonl' }], from: 'last' };
      const first = await create(jobs, 'ok', { ...asked, ...to('refused') });
      await ended(jobs, first.id);
      expect(jobs.get(first.id)).toMatchObject({
        status: 'failed',
        error: expect.stringContaining('The edge is away.'),
      });
      const learned = await jobs.read(first.id, 'mask-set.json');
      await change(first);
      const { id } = await create(jobs, 'ok', { ...asked, ...to('acme') });
      await ended(jobs, id);
      expect(jobs.get(id)).toMatchObject({ status: 'succeeded', error: null });
      expect(published(id).args).not.toContain('--unless-rolled-back');
      const clustersOf = (set: string) => JSON.parse(set).clusters;
      expect(clustersOf(await jobs.read(id, 'mask-set.json'))).toEqual(clustersOf(learned));
      // The earlier one keeps its own.
      expect(existsSync(join(folderOf(first.id), 'out', 'mask-set.json'))).toBe(true);
      return starts(id).length;
    }

    it('is done by an equal job, which does not learn again', async () => {
      expect(await startsAfter(() => {})).toBe(1);
    });

    it('is done by an equal job, also where its set does not say from which upload it was learned', async () => {
      const jobs = await start();
      const first = await create(jobs, 'ok', to('refused'));
      await ended(jobs, first.id);
      const file = join(folderOf(first.id), 'out', 'mask-set.json');
      const set = JSON.parse(readFileSync(file, 'utf8'));
      writeFileSync(file, JSON.stringify({ ...set, learned: { ...set.learned, dataHash: undefined } }));
      const { id } = await create(jobs, 'ok', to('acme'));
      await ended(jobs, id);
      expect(jobs.get(id).status).toBe('succeeded');
      expect(starts(id)).toHaveLength(1);
    });

    it('is done by an equal job, also where the same data was written anew', async () => {
      expect(await startsAfter(() => writeData('x'))).toBe(1);
    });

    it('is done by an equal job that learns again where data has changed by another clock', async () => {
      // The data's clock is a day behind.
      vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 86_400_000 });
      onTestFinished(() => void vi.useRealTimers());
      expect(await startsAfter(() => writeData('y'))).toBe(2);
    });

    it.each<[string, (learned: Job) => unknown]>([
      ['its data has changed', () => writeData('y')],
      [
        'other weights are installed',
        async () => {
          const folder = join(home, 'models', 'served');
          const { manifest } = await installTinyModel(folder, 'f32');
          writeFileSync(join(folder, 'model.json'), JSON.stringify(manifest));
        },
      ],
      ['its set is damaged', ({ id }) => writeFileSync(join(folderOf(id), 'out', 'mask-set.json'), '{}')],
      [
        'it would begin with another set',
        async ({ request: { publish: _, ...asked } }) => {
          const jobs = open.at(-1)!;
          const { id } = await jobs.create({ ...asked, seed: 1 });
          await ended(jobs, id);
        },
      ],
    ])('is done by an equal job that learns again where %s', async (_what, change) => {
      expect(await startsAfter(change)).toBe(2);
    });
  });

  it('is refused before it learns where the edge does not take the key, and says why', async () => {
    const jobs = await start();
    const publish = { edge: edge.url, tenant: 'acme', activate: true, admin_key: ADMIN_KEY };
    await create(jobs, 'ok', { publish });
    expect(edge.asked.at(-1)).toEqual({
      key: ADMIN_KEY,
      body: { version: expect.stringMatching(/^v_0+$/), tenant: 'acme', activate: false },
    });
    for (const code of ['invalid_api_key', 'forbidden', 'not_found', 'tenant_disabled'] as const) {
      edge.says(code);
      await expect(create(jobs, 'ok', { publish })).rejects.toMatchObject({
        code: 'invalid_request',
        param: 'publish',
        message: `publish: the edge at ${edge.url} refuses it: It says ${code}.`,
      });
    }
    // Statuses of the edge, which would seem to be the backend's own.
    for (const code of ['configuration_unavailable', 'rate_limit_exceeded'] as const) {
      edge.says(code);
      await expect(create(jobs, 'ok', { publish })).rejects.toMatchObject({
        code: 'edge_unreachable',
        message: `publish: the edge at ${edge.url} does not say whether it allows it: It says ${code}.`,
      });
    }
    const nobody = { ...publish, edge: 'http://127.0.0.1:9' };
    await expect(create(jobs, 'ok', { publish: nobody })).rejects.toMatchObject({ code: 'edge_unreachable' });
    expect(jobs.list()).toHaveLength(1);
  });

  it('holds up nobody else while its edge does not answer', async () => {
    const jobs = await start();
    const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
    const release = edge.holds();
    const asking = create(jobs, 'ok', { publish });
    const { id } = await create(jobs, 'ok');
    await ended(jobs, id);
    expect(jobs.list()).toHaveLength(1);
    release();
    await asking;
    expect(jobs.list()).toHaveLength(2);
  });

  it('fails before it learns where the key was revoked while it waited, and is cancelled while its edge is asked', async () => {
    const jobs = await start();
    const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
    const first = await create(jobs, 'hang');
    const revoked = await create(jobs, 'ok', { publish });
    const next = await create(jobs, 'ok', { publish });
    edge.says('invalid_api_key');
    await jobs.cancel(first.id);
    await ended(jobs, revoked.id);
    expect(jobs.get(revoked.id)).toMatchObject({
      status: 'failed',
      error: `publish: the edge at ${edge.url} refuses it: It says invalid_api_key.`,
    });
    await ended(jobs, next.id);
    edge.says();
    const asked = await create(jobs, 'hang', { seed: 1 });
    const last = await create(jobs, 'ok', { publish });
    const release = edge.holds();
    await jobs.cancel(asked.id);
    await eventually(() => jobs.get(last.id).status === 'running', 15_000);
    expect(await jobs.cancel(last.id)).toMatchObject({ status: 'cancelled' });
    release();
    expect([starts(revoked.id), starts(last.id)]).toEqual([[], []]);
  });

  it('is refused before it learns where the backend key has changed', async () => {
    const first = await start();
    const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
    const { id } = await create(first, 'hang', { publish });
    await hangs(id);
    await first.close();
    const second = (await openJobs({ ...options(), backendKeys: ['another-backend-key'] }))!;
    open.push(second);
    await ended(second, id);
    expect(second.get(id)).toMatchObject({
      status: 'failed',
      error: expect.stringContaining('the backend key has changed'),
    });
    expect(starts(id)).toHaveLength(1);
  });

  it('seals a secret for one job under one key', () => {
    const sealed = seal('secret', KEY, 'job_1');
    expect(unseal(sealed, [KEY], 'job_1')).toBe('secret');
    expect(() => unseal(sealed, [KEY], 'job_2')).toThrow();
    expect(() => unseal(sealed, ['another key'], 'job_1')).toThrow(/backend key has changed/);
    // While the key is rotated, what the one before sealed is opened.
    expect(unseal(sealed, ['another key', KEY], 'job_1')).toBe('secret');
    expect(() => unseal(sealed, ['another key', 'a third'], 'job_1')).toThrow();
    sealed[sealed.length - 1]! ^= 1;
    expect(() => unseal(sealed, [KEY], 'job_1')).toThrow();
    expect(seal('secret', KEY, 'job_1').equals(seal('secret', KEY, 'job_1'))).toBe(false);
  });
});

describe('data', () => {
  it('is named by content, listed, removed, and kept while a job needs it', async () => {
    const jobs = await start();
    const first = await jobs.data.add('a', streamOf('{"text": 1}'));
    const again = await jobs.data.add('a', streamOf('{"text": 1}'));
    expect([first.created, again.created, again.data.id]).toEqual([true, false, first.data.id]);
    const { id } = await create(jobs, 'hang');
    await hangs(id);
    const [source] = jobs.get(id).request.data as { upload: string }[];
    await expect(jobs.removeData(source!.upload)).rejects.toMatchObject({ code: 'conflict' });
    await jobs.cancel(id);
    await jobs.removeData(source!.upload);
    await jobs.removeData(first.data.id);
    expect(await jobs.data.list()).toEqual([]);
    await expect(jobs.removeData(first.data.id)).rejects.toMatchObject({ code: 'not_found' });
    await expect(jobs.removeData('../..')).rejects.toMatchObject({ code: 'not_found' });
    await expect(jobs.data.add('a', streamOf(''))).rejects.toMatchObject({ code: 'invalid_data' });
  });

  it('whose first line is no JSON object is refused, and leaves nothing', async () => {
    const jobs = await start();
    for (const text of ['question,answer\n1,2\n', '[{"text": "x"}]', '\n\n"text"\n', '{"text": "x"', ' \n'])
      await expect(jobs.data.add('a', streamOf(text)), text).rejects.toMatchObject({ code: 'invalid_data' });
    await expect(jobs.data.add('a', streamOf('\n1\n'))).rejects.toThrow(/JSONL: line 2 is no JSON object/);
    expect(await jobs.data.list()).toEqual([]);
    const long = JSON.stringify({ text: 'ä'.repeat(1024 * 1024) });
    for (const text of ['\uFEFF\r\n{"text": "x"}\r\nno row', long])
      expect((await jobs.data.add('a', streamOf(text))).created).toBe(true);
  });

  it('of a job that is just being created is kept, too', async () => {
    const jobs = await start();
    const asked = await request(jobs, 'hang');
    const [source] = asked.data as { upload: string }[];
    const created = jobs.create(asked);
    await expect(jobs.removeData(source!.upload)).rejects.toMatchObject({ code: 'conflict' });
    await jobs.cancel((await created).id);
  });

  it('that breaks off leaves nothing', async () => {
    const jobs = await start();
    const broken = new ReadableStream<Uint8Array>({
      pull(controller) {
        controller.enqueue(new Uint8Array(10));
        controller.error(new Error('gone'));
      },
    });
    await expect(jobs.data.add('a', broken)).rejects.toMatchObject({ code: 'cancelled' });
    expect(readdirSync(join(home, 'jobs', 'data'))).toEqual([]);
  });

  it('that a kill cut off is gone after the next start', async () => {
    const folder = join(home, 'jobs', 'data');
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, '.part-0'), 'x');
    const jobs = await start();
    expect(readdirSync(folder)).toEqual([]);
    expect(await jobs.data.list()).toEqual([]);
  });

  it('that stands still is given up', async () => {
    const limits = { uploadsMax: 1, uploadBytesMax: 60, allBytesMax: 100, idle_ms: 50 };
    const data = new JobData(join(home, 'data'), undefined, limits);
    await expect(data.add('a', new ReadableStream())).rejects.toMatchObject({ code: 'request_timeout' });
    expect((await data.add('a', streamOf('{}'))).created).toBe(true);
  });

  it('that is removed while it is looked at is not listed', async () => {
    const data = new JobData(join(home, 'data'), undefined);
    const { id } = (await data.add('a', streamOf('{}'))).data;
    const file = join(home, 'data', id, 'a.jsonl');
    rmSync(file);
    symlinkSync('nowhere', file);
    expect(await data.list()).toEqual([]);
  });

  it('that the disk does not take is no fault of its client', async () => {
    const data = new JobData(join(home, 'data'), undefined);
    const { id } = (await data.add('a', streamOf('{}'))).data;
    await data.remove(id);
    writeFileSync(join(home, 'data', id), 'in the way');
    await expect(data.add('a', streamOf('{}'))).rejects.toMatchObject({ code: 'EEXIST' });
  });

  it('that arrives beside others shares the room with them, and is refused where too many arrive', async () => {
    const data = new JobData(join(home, 'data'), undefined, {
      uploadsMax: 2,
      uploadBytesMax: 60,
      allBytesMax: 100,
      idle_ms: 30_000,
    });
    const slow = () => {
      const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
      const writer = writable.getWriter();
      return {
        readable,
        send: (count: number) => writer.write(Buffer.from('{}'.padEnd(count))),
        end: () => writer.close(),
      };
    };
    const [one, two] = [slow(), slow()];
    const first = data.add('one', one.readable);
    const second = data.add('two', two.readable);
    second.catch(() => {});
    await expect(data.add('three', streamOf('{}'))).rejects.toMatchObject({ code: 'queue_full' });
    await one.send(60);
    await two.send(60).catch(() => {});
    await expect(second).rejects.toMatchObject({ code: 'body_too_large' });
    await one.end();
    expect((await first).data.bytes).toBe(60);
    await expect(data.add('three', streamOf('{}'.padEnd(41)))).rejects.toMatchObject({
      code: 'body_too_large',
    });
    expect((await data.add('three', streamOf('{}'.padEnd(40)))).created).toBe(true);
  });

  it('by path comes from the open folder and nowhere else', async () => {
    const outside = join(home, 'outside.jsonl');
    writeFileSync(outside, 'x');
    const folder = join(home, 'open');
    mkdirSync(folder);
    writeFileSync(join(folder, 'ok.jsonl'), 'x');
    symlinkSync(outside, join(folder, 'link.jsonl'));
    const { data } = await start(folder);
    expect(await data.files({ data: [{ path: 'ok.jsonl' }] })).toEqual([join(folder, 'ok.jsonl')]);
    for (const path of ['link.jsonl', '../outside.jsonl', outside, 'none.jsonl', '.']) {
      await expect(data.files({ data: [{ path }] }), path).rejects.toMatchObject({ code: 'not_found' });
    }
  });
});

it('a job asks the command line for what its request says, and for nothing else', () => {
  const asked: JobRequest = {
    kind: 'learn',
    model: 'm',
    data: [],
    clusters: 64,
    sparsity: 0.25,
    encoder: 'static',
  };
  const plain = learnArguments(asked, ['a.jsonl'], 'out').join(' ');
  expect(plain).toContain('--clusters 64 --sparsity 0.25');
  expect(plain).not.toMatch(/--masks|--cost|--context|--quick/);
  const more: JobRequest = { ...asked, masks: 4, cost: 'time', context: 2000 };
  expect(learnArguments(more, ['a.jsonl'], 'out').join(' ')).toContain(
    '--masks 4 --cost time --context 2000',
  );
  expect(learnArguments(more, ['a.jsonl'], 'out', 'earlier.json').join(' ')).not.toContain('--context');
  const rest: JobRequest = { ...asked, name: 'mine', surrogate: false, rows: 5, quick: true, seed: 0 };
  expect(learnArguments(rest, ['a.jsonl'], 'out').join(' ')).toMatch(
    /--name mine --no-surrogate --rows 5 --quick --seed 0$/,
  );
  expect(learnArguments({ ...asked, surrogate: true }, [], 'out')).toContain('--surrogate');
});
