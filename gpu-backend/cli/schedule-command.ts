/** `schedule`: repeated learning jobs on a running backend, asked with the backend's key or through an edge. */
import type { Command } from 'commander';
import { deletedSchema, listSchema } from '../../shared/admin/admin-wire.ts';
import { jobSchema, type Schedule, scheduleSchema } from '../../shared/admin/job-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isJsonObject } from '../../shared/wire/parse-body.ts';
import { readJson, unreadable } from '../files.ts';
import { adminClient, backendClient, EDGE_OPTION } from './edge-access.ts';
import { examples } from './help.ts';
import { JSON_OPTION } from './terminal.ts';

type Flags = {
  readonly backend?: string;
  readonly edge?: string;
  readonly on?: string;
  readonly json: boolean;
};

const BACKEND_OPTION = ['--backend <url>', 'the backend (default: a running "npm start")'] as const;
const ON_OPTION = [
  '--on <id>',
  'go through the edge instead: the id of the backend in its registry',
] as const;
const KEY_HELP = `
The backend key comes from MASKROUTE_BACKEND_KEY, or from a running "npm start" when that is the backend. Through an edge
no backend key is needed, but an admin key in MASKROUTE_ADMIN_KEY. A job that publishes takes its admin key from there, too,
where the file has none; through an edge it publishes at that edge, and its "publish" names none.`;

/** Adds the options that all schedule commands have, and examples. */
const atBackend = (command: Command, ...lines: string[]): Command =>
  command
    .option(...BACKEND_OPTION)
    .option(...ON_OPTION)
    .option(...EDGE_OPTION)
    .option(...JSON_OPTION)
    .addHelpText('after', KEY_HELP)
    .addHelpText('after', examples(...lines));

export function addScheduleCommands(program: Command): void {
  const schedule = program
    .command('schedule')
    .description('learn again and again on a running backend, and publish what was learned')
    .addHelpText('after', examples('maskroute schedule add job.json --every 24h', 'maskroute schedule list'));

  atBackend(
    schedule
      .command('add')
      .description('add a repeated job; the file is JSON, the body of POST /v1/jobs')
      .argument('<file>', 'the job: its data, what to learn, and where to publish it')
      .requiredOption('--every <span>', 'how often: 30m, 24h, 7d')
      .option(
        '--first <time>',
        'when the first job begins, such as 2026-01-31T03:00:00Z (default: after one span)',
      ),
    'maskroute schedule add job.json --every 24h --first 2026-01-31T03:00:00Z',
  ).action(async (file: string, { every, first, ...flags }: Flags & { every: string; first?: string }) => {
    const job = await readJob(file);
    const { client, jobs, where } = await placeOf(flags);
    const body = { every, ...(first === undefined ? {} : { first_at: first }), job };
    const path = `${jobs}/schedules`;
    const made = await client.request({ method: 'POST', path, body }, scheduleSchema);
    console.log(flags.json ? JSON.stringify(made) : `${describeSchedule(made)} at ${where}`);
  });

  atBackend(
    schedule
      .command('list')
      .description('list the schedules, with their next time and how the last job ended'),
    'maskroute schedule list --backend https://backend.example.com',
    'maskroute schedule list --edge https://edge.example.com --on backend-1',
  ).action(async ({ json, ...flags }: Flags) => {
    const { client, jobs: path, where } = await placeOf(flags);
    const get = (path: string) => ({ method: 'GET', path }) as const;
    const { data } = await client.request(get(`${path}/schedules`), listSchema(scheduleSchema));
    if (json) return console.log(JSON.stringify(data));
    if (data.length === 0) return console.log(`No schedules at ${where} yet.`);
    const jobs = await client.request(get(path), listSchema(jobSchema));
    for (const one of data) {
      const last = jobs.data.find(({ id }) => id === one.last_job);
      const ended = last === undefined ? '' : `; ${last.id} ${last.status}`;
      console.log(`${describeSchedule(one)}${ended}${last?.error == null ? '' : `: ${last.error}`}`);
    }
  });

  atBackend(
    schedule
      .command('remove')
      .description('delete a schedule; its jobs stay')
      .argument('<id>', 'a schedule, as list shows it'),
    'maskroute schedule remove schedule_0123456789abcdef01234567',
  ).action(async (id: string, { json, ...flags }: Flags) => {
    const { client, jobs, where } = await placeOf(flags);
    const path = `${jobs}/schedules/${encodeURIComponent(id)}`;
    const removed = await client.request({ method: 'DELETE', path }, deletedSchema);
    console.log(json ? JSON.stringify(removed) : `${id}: deleted at ${where}`);
  });
}

const describeSchedule = ({ id, every, next_at, job }: Schedule): string => {
  const where = job.publish === undefined ? '' : ` for ${job.publish.edge}`;
  return `${id}  every ${every}, next ${next_at}: learns with ${job.model}${where}`;
};

const JOB_BYTES_MAX = 1024 * 1024;

/** @throws MaskrouteError `invalid_argument` when the file cannot be read, or holds no JSON object. */
async function readJob(file: string): Promise<object> {
  const invalid = (cause?: unknown) =>
    new MaskrouteError('invalid_argument', `${file} has no job: expected a JSON object.`, { cause });
  const job = await readJson(file, JOB_BYTES_MAX, (_, cause) => invalid(cause)).catch((error: unknown) => {
    throw unreadable(file, error);
  });
  if (!isJsonObject(job)) throw invalid();
  const admin_key = process.env.MASKROUTE_ADMIN_KEY;
  // The backend says what is wrong with a `publish` that is no object.
  if (!isJsonObject(job.publish) || !admin_key) return job;
  return { ...job, publish: { admin_key, ...job.publish } };
}

/** The client, the path of the backend's jobs, and the backend's name in messages. @throws MaskrouteError `invalid_argument`. */
async function placeOf({ backend, edge, on }: Omit<Flags, 'json'>) {
  if (on === undefined) {
    if (edge !== undefined) throw misused('--edge needs --on, the id of the backend in its registry.');
    const client = await backendClient(backend);
    return { client, jobs: '/jobs', where: client.backend };
  }
  if (backend !== undefined) throw misused('--on and --backend both name a backend: give one of them.');
  const client = await adminClient(edge);
  return { client, jobs: `/backends/${encodeURIComponent(on)}/jobs`, where: `${on} of ${client.edge}` };
}

const misused = (message: string): MaskrouteError => new MaskrouteError('invalid_argument', message);
