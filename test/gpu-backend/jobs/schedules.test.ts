/** Jobs that come again: when, after a restart, after a time away, and what stands in the list when one cannot begin. */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  watch,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, beforeEach, expect, it } from 'vitest';
import { type Jobs, openJobs } from '../../../gpu-backend/jobs/job-queue.ts';
import { openSchedules, type Schedules } from '../../../gpu-backend/jobs/schedules.ts';
import {
  type CreateJob,
  createScheduleSchema,
  isFinished,
  type Schedule,
} from '../../../shared/admin/job-wire.ts';
import { eventually } from '../api/harness.ts';
import { startJobsEdge } from './fixtures/edge.ts';

const KEY = 'a-backend-key-of-the-tests';
const ADMIN_KEY = 'an-admin-key-that-nobody-may-read';
const entry = fileURLToPath(new URL('./fixtures/command.ts', import.meta.url));
const DAY_ms = 86_400_000;

let edge: Awaited<ReturnType<typeof startJobsEdge>>;
beforeAll(async () => {
  edge = await startJobsEdge();
});
afterAll(() => edge.close());

let home = '';
let dataFolder = '';
let close = async () => {};
beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), 'maskroute-schedules-'));
  dataFolder = join(home, 'open');
  mkdirSync(dataFolder);
  writeFileSync(join(dataFolder, 'ok.jsonl'), '{"text": "x"}\n');
  writeFileSync(join(dataFolder, 'hang.jsonl'), '{"text": "x"}\n');
});
afterEach(async () => {
  edge.says();
  await close();
  rmSync(home, { recursive: true, force: true });
});

/** As a backend starts and stops. */
async function start(backendKey = KEY): Promise<{ jobs: Jobs; schedules: Schedules }> {
  const options = { home, model: 'served', backendKeys: [backendKey] as const, note: () => {} };
  const jobs = (await openJobs({ ...options, entry, dataFolder }))!;
  const schedules = await openSchedules(options, jobs);
  close = async () => {
    await schedules.close();
    await jobs.close();
  };
  return { jobs, schedules };
}

const job = (behaviour: string, more: Partial<CreateJob> = {}): CreateJob => ({
  kind: 'learn',
  data: [{ path: `${behaviour}.jsonl` }],
  clusters: 2,
  sparsity: 0.1,
  encoder: 'static',
  ...more,
});
const at = (ms: number) => new Date(ms).toISOString();
const now = () => at(Date.now() - 1000);
const finished = (jobs: Jobs, count: number) =>
  eventually(() => jobs.list().filter(isFinished).length === count, 20_000);
const fileOf = ({ id }: Schedule) => join(home, 'jobs', 'schedules', id, 'schedule.json');

it('a schedule learns and publishes by the rollout and the bounds that it names', async () => {
  const { jobs, schedules } = await start();
  const publish = {
    edge: edge.url,
    tenant: 'acme',
    activate: true,
    admin_key: ADMIN_KEY,
    rollout: [
      { share: 0.07, duration_s: 600 },
      { share: 0.5, duration_s: 3600 },
    ],
    auto_rollback: { error_rate_max: 0.02, tpot_ratio_max: 1.1, tpot_ms_max: 50, requests_min: 200 },
  };
  const made = await schedules.create({ every: '24h', first_at: now(), job: job('ok', { publish }) });
  expect(JSON.stringify(schedules.list())).not.toContain(ADMIN_KEY);
  await finished(jobs, 1);
  const [done] = jobs.list();
  expect(done).toMatchObject({ status: 'succeeded', schedule: made.id });
  expect(done!.result!.published).toContain('live at the edge');
  const { args, key } = JSON.parse(readFileSync(join(home, 'jobs', done!.id, 'published.json'), 'utf8'));
  expect(key).toBe(ADMIN_KEY);
  expect(args.slice(1).join(' ')).toBe(
    `--edge ${edge.url} --tenant acme --activate --once ${join(home, 'jobs', done!.id, 'first-try.json')} ` +
      '--unless-rolled-back --rollout 7%:600s,50%:3600s ' +
      '--max-error-rate 0.02 --max-slowdown 1.1 --max-token-ms 50 --min-requests 200',
  );
  expect(schedules.get(made.id)).toMatchObject({ last_job: done!.id });
  // On the beat of its own times, not of when a job happened to begin.
  expect(Date.parse(schedules.get(made.id).next_at) - Date.parse(made.next_at)).toBe(DAY_ms);
});

it.each<[string, Partial<CreateJob>]>([
  ['a search', {}],
  ['the last set', { from: 'last' }],
])(
  'beginning with %s, learns the same data once, and publishes anew only what is not its last set',
  async (_, more) => {
    let { jobs, schedules } = await start();
    const publish = { edge: edge.url, tenant: 'acme', activate: true, admin_key: ADMIN_KEY };
    const made = await schedules.create({
      every: '24h',
      first_at: now(),
      job: job('ok', { publish, ...more }),
    });
    await finished(jobs, 1);
    const data = join(dataFolder, 'ok.jsonl');
    const [earlier, later] = ['{"text": "x"}\n', '{"text": "y"}\n'];
    for (const [count, text] of [earlier, later, later, earlier].entries()) {
      await close();
      // Also a file of the same content has another date.
      writeFileSync(data, text);
      writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at: at(Date.now()) }));
      ({ jobs, schedules } = await start());
      await finished(jobs, count + 2);
    }
    // The newest first.
    const done = jobs.list();
    const folders = done.map(({ id }) => join(home, 'jobs', id));
    const hasLearned = folders.map((folder) => existsSync(join(folder, 'arguments')));
    expect(hasLearned).toEqual([false, false, true, false, true]);
    const versions = done.map(({ result }) => result!.version);
    expect(versions.map((version) => versions.indexOf(version))).toEqual([0, 1, 1, 0, 0]);
    const tries = folders.map((folder) => {
      const [, of] = readFileSync(join(folder, 'first-try.json'), 'utf8').split('the first try of ');
      return folders.indexOf(of!);
    });
    expect(tries).toEqual([0, 2, 2, 4, 4]);
  },
);

it('takes the set of its earlier job with this data, though a later one with other data was cancelled in the middle', async () => {
  let { jobs, schedules } = await start();
  const made = await schedules.create({ every: '24h', first_at: now(), job: job('hang') });
  const due = async (text: string) => {
    await close();
    writeFileSync(join(dataFolder, 'hang.jsonl'), text);
    writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at: at(Date.now()) }));
    ({ jobs, schedules } = await start());
  };
  await eventually(() => jobs.list()[0]?.progress != null, 20_000);
  // It hangs the first time only.
  await close();
  ({ jobs, schedules } = await start());
  await finished(jobs, 1);
  await due('{"text": "y"}\n');
  await eventually(() => jobs.list()[0]?.progress != null, 20_000);
  await jobs.cancel(jobs.list()[0]!.id);
  await due('{"text": "x"}\n');
  await finished(jobs, 3);
  const [again, , first] = jobs.list();
  expect(again!.result).toEqual(first!.result);
});

it('survives a restart; what passed while the backend was away is made up for once', async () => {
  const first = await start();
  const made = await first.schedules.create({ every: '24h', job: job('ok') });
  expect(Date.parse(made.next_at)).toBeGreaterThan(Date.now() + DAY_ms - 60_000);
  await close();

  const second = await start();
  expect(second.schedules.list()).toEqual([made]);
  expect(second.jobs.list()).toEqual([]);
  await close();

  const due_ms = Date.now() - 3.5 * DAY_ms;
  writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at: at(due_ms) }));
  const third = await start();
  await finished(third.jobs, 1);
  expect(third.schedules.get(made.id).next_at).toBe(at(due_ms + 4 * DAY_ms));
  await close();

  const fourth = await start();
  await fourth.schedules.close();
  expect(fourth.jobs.list()).toHaveLength(1);
});

it('a clock that was ahead when its last job began stops no schedule until then', async () => {
  const first = await start();
  const made = await first.schedules.create({ every: '24h', first_at: now(), job: job('ok') });
  const later_ms = Date.now() + 30 * DAY_ms;
  const later = await first.schedules.create({ every: '24h', first_at: at(later_ms), job: job('ok') });
  await finished(first.jobs, 1);
  await eventually(() => first.schedules.get(made.id).last_job !== null);
  await close();
  const [begun] = first.jobs.list();
  const ahead = { ...begun, created_at: at(later_ms - DAY_ms) };
  writeFileSync(join(home, 'jobs', begun!.id, 'job.json'), JSON.stringify(ahead));
  writeFileSync(fileOf(made), JSON.stringify({ ...first.schedules.get(made.id), next_at: at(later_ms) }));

  const second = await start();
  await finished(second.jobs, 2);
  await eventually(() => second.schedules.get(made.id).last_job !== begun!.id);
  const left_ms = Date.parse(second.schedules.get(made.id).next_at) - Date.now();
  expect(left_ms).toBeGreaterThan(0);
  expect(left_ms).toBeLessThanOrEqual(DAY_ms);
  // It has not begun yet, and was made for that day.
  expect(second.schedules.get(later.id)).toEqual(later);
  await close();

  writeFileSync(fileOf(made), JSON.stringify({ ...second.schedules.get(made.id), next_at: at(Date.now()) }));
  const third = await start();
  await finished(third.jobs, 3);
});

it('a kill between a job and the next time begins no second job', async () => {
  const first = await start();
  const made = await first.schedules.create({ every: '1h', first_at: now(), job: job('ok') });
  await finished(first.jobs, 1);
  const [begun] = first.jobs.list();
  // A time may name no milliseconds, and a job begins within the second.
  for (const next_at of [made.next_at, begun!.created_at.replace(/\.\d+Z$/, 'Z')]) {
    await close();
    writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at }));
    const { jobs, schedules } = await start();
    await schedules.close();
    expect(jobs.list()).toHaveLength(1);
    expect(schedules.get(made.id).last_job).toBe(begun!.id);
  }
});

it('waits for its own last job, and begins the next after it', async () => {
  const { jobs, schedules } = await start();
  const made = await schedules.create({ every: '1m', first_at: now(), job: job('hang') });
  const outOf = ({ id }: { id: string }) => join(home, 'jobs', id, 'out');
  await eventually(() => jobs.list().some((first) => existsSync(join(outOf(first), 'step-2'))), 20_000);
  const [first] = jobs.list();
  await close();
  // It is due again, and its job hangs again.
  writeFileSync(fileOf(made), JSON.stringify({ ...schedules.get(made.id), next_at: at(Date.now()) }));
  rmSync(outOf(first!), { recursive: true });
  const again = await start();
  await eventually(() => again.jobs.list()[0]?.status === 'running', 20_000);
  expect(again.jobs.list()).toHaveLength(1);
  await again.jobs.cancel(again.jobs.list()[0]!.id);
  await eventually(() => again.jobs.list().length === 2, 20_000);
});

it('queues its job while a job of somebody else runs', async () => {
  const { jobs, schedules } = await start();
  const other = await jobs.create(job('hang'));
  const { id } = await schedules.create({ every: '1h', first_at: now(), job: job('ok') });
  await eventually(() => jobs.list().length === 2, 20_000);
  expect(jobs.list()[0]).toMatchObject({ status: 'waiting', schedule: id });
  await jobs.cancel(other.id);
});

it('there are at most 32, listed with the newest first', async () => {
  const { schedules } = await start();
  const ids: string[] = [];
  for (let i = 0; i < 32; i++) {
    ids.unshift((await schedules.create({ every: '24h', job: job('ok') })).id);
    await sleep(2);
  }
  await expect(schedules.create({ every: '24h', job: job('ok') })).rejects.toMatchObject({
    code: 'queue_full',
  });
  expect(schedules.list().map(({ id }) => id)).toEqual(ids);
});

it('a run that cannot begin stands among the jobs and says why, and the next one comes all the same', async () => {
  const { jobs, schedules } = await start();
  const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
  const made = await schedules.create({ every: '24h', job: job('ok', { publish }) });
  await close();
  rmSync(join(dataFolder, 'ok.jsonl'));
  writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at: now() }));
  const away = await start();
  await finished(away.jobs, 1);
  expect(away.jobs.list()[0]).toMatchObject({
    status: 'failed',
    schedule: made.id,
    started_at: null,
    error: expect.stringContaining('There is no ok.jsonl'),
  });
  // The job stands there a moment before the schedule's next time does.
  await eventually(() => Date.parse(away.schedules.get(made.id).next_at) > Date.now(), 20_000);
  await close();

  writeFileSync(join(dataFolder, 'ok.jsonl'), '{"text": "x"}\n');
  writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at: at(Date.now()) }));
  const rotated = await start('another-backend-key-altogether');
  await finished(rotated.jobs, 2);
  expect(rotated.jobs.list()[0]!.error).toContain('the backend key has changed since');
  expect(jobs.list()).toEqual([]);
});

it('whose key may not publish is refused, and so are its jobs once the key is revoked; an edge that is away is waited for', async () => {
  const { schedules } = await start();
  const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
  for (const code of ['forbidden', 'not_ready'] as const) {
    edge.says(code);
    const made = schedules.create({ every: '24h', job: job('ok', { publish }) });
    await expect(made).rejects.toThrow(`It says ${code}.`);
  }
  edge.says();
  const made = await schedules.create({ every: '24h', job: job('ok', { publish }) });
  for (const [code, status] of [
    ['invalid_api_key', 'failed'],
    ['not_ready', 'succeeded'],
  ] as const) {
    await close();
    edge.says(code);
    writeFileSync(fileOf(made), JSON.stringify({ ...made, next_at: at(Date.now()) }));
    const { jobs } = await start();
    await eventually(() => jobs.list()[0]?.status === status, 20_000);
    const error = code === 'not_ready' ? null : expect.stringContaining(`It says ${code}.`);
    expect(jobs.list()[0]).toMatchObject({ error });
    expect(existsSync(join(home, 'jobs', jobs.list()[0]!.id, 'starts'))).toBe(code === 'not_ready');
  }
});

it('keeps its data, and is gone when it is removed', async () => {
  const { jobs, schedules } = await start();
  const { data } = await jobs.data.add('ok', new Blob(['{"text": "x"}\n']).stream());
  const creating = schedules.create({ every: '7d', job: { ...job('ok'), data: [{ upload: data.id }] } });
  await expect(schedules.removeData(data.id)).rejects.toThrow(/needs this data/);
  const made = await creating;
  const removed = schedules.remove(made.id);
  // The disk answers in a later turn of the event loop: until then the schedule is there.
  for (let i = 0; i < 100; i++) await null;
  expect(schedules.list()).toEqual([made]);
  await removed;
  await schedules.removeData(data.id);
  expect(await jobs.data.list()).toEqual([]);
  expect(schedules.list()).toEqual([]);
  expect(readdirSync(join(home, 'jobs', 'schedules'))).toEqual([]);
  await expect(schedules.remove(made.id)).rejects.toMatchObject({ code: 'not_found' });
  await expect(schedules.create({ every: '1h', job: job('missing') })).rejects.toMatchObject({
    code: 'not_found',
  });
});

it('is removed before its secret: a kill in between leaves no schedule whose jobs fail', async () => {
  const { schedules } = await start();
  const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
  const made = await schedules.create({ every: '1h', job: job('ok', { publish }) });
  const folder = dirname(fileOf(made));
  // Whatever the order in which a file system lists files, by name or by age.
  for (const name of ['a', 'z']) writeFileSync(join(folder, name), '');
  const gone: (string | null)[] = [];
  const watcher = watch(folder, (_, name) => gone.push(name));
  await schedules.remove(made.id);
  await eventually(() => gone.includes('secret'));
  watcher.close();
  expect(gone[0]).toBe('schedule.json');
});

it('a schedule that the disk does not take leaves no secret, and neither does a kill', async () => {
  const { schedules } = await start();
  const folder = join(home, 'jobs', 'schedules');
  mkdirSync(join(home, 'jobs'), { recursive: true });
  writeFileSync(folder, 'in the way');
  const publish = { edge: edge.url, tenant: '', activate: true, admin_key: ADMIN_KEY };
  await expect(schedules.create({ every: '1h', job: job('ok', { publish }) })).rejects.toThrow(
    /ENOTDIR|EEXIST/,
  );
  expect(schedules.list()).toEqual([]);
  await close();
  rmSync(folder);
  const cut = join(folder, `schedule_${'1'.repeat(24)}`);
  mkdirSync(cut, { recursive: true });
  writeFileSync(join(cut, 'secret'), 'sealed');
  await start();
  expect(readdirSync(folder)).toEqual([]);
});

it.each([
  ['no span', { every: 'often' }],
  ['a span of seconds', { every: '30s' }],
  ['a span of years', { every: '400d' }],
  ['a time that is none', { first_at: 'tomorrow' }],
  [
    'a rollout of what does not go live',
    {
      job: job('ok', {
        publish: {
          edge: 'https://e.example',
          rollout: [{ share: 0.1, duration_s: 9 }],
          admin_key: 'k',
        } as never,
      }),
    },
  ],
  ...['a pasted…', 'of two\nlines', 'with a space', ''].map((admin_key): [string, object] => [
    `the key ${JSON.stringify(admin_key)}`,
    { job: job('ok', { publish: { edge: 'https://e.example', admin_key } as never }) },
  ]),
])('refuses %s', (_what, changes) => {
  expect(createScheduleSchema.safeParse({ every: '24h', job: job('ok') }).success).toBe(true);
  expect(createScheduleSchema.safeParse({ every: '24h', job: job('ok'), ...changes }).success).toBe(false);
});
