/** `status` and `history`: what is live at an edge, and its publications. */
import type { Command } from 'commander';
import type { z } from 'zod';
import { listSchema } from '../../shared/admin/admin-wire.ts';
import { type Job, jobSchema, type Schedule, scheduleSchema } from '../../shared/admin/job-wire.ts';
import type { LivePublication, Publication } from '../../shared/admin/publication-wire.ts';
import { type BackendEntry, backendSchema } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { AdminClient } from '../publication/admin-client.ts';
import { livePublication, namesOfVersions, publicationHistory } from '../publication/publish.ts';
import { adminClient, EDGE_OPTION, KEY_HELP, tenantOption, whose } from './edge-access.ts';
import { examples } from './help.ts';
import { JSON_OPTION, wholeNumber } from './terminal.ts';

type Flags = { readonly edge?: string; readonly tenant: string; readonly json: boolean };

export function addStatusCommands(program: Command): void {
  program
    .command('status')
    .description('show what is live at an edge, its backends and their jobs')
    .option(...EDGE_OPTION)
    .addOption(tenantOption())
    .option(...JSON_OPTION)
    .addHelpText('after', KEY_HELP)
    .addHelpText(
      'after',
      examples('maskroute status', 'maskroute status --edge https://edge.example.com --tenant acme --json'),
    )
    .action(async ({ edge, tenant, json }: Flags) => {
      const client = await adminClient(edge);
      const status = await readStatus(client, tenant);
      console.log(json ? JSON.stringify(status) : describeStatus(status));
    });

  program
    .command('history')
    .description('list the publications at an edge, newest first')
    .option(...EDGE_OPTION)
    .addOption(tenantOption())
    .option('--limit <count>', 'publications listed at most', wholeNumber(1), 20)
    .option(...JSON_OPTION)
    .addHelpText('after', KEY_HELP)
    .addHelpText('after', examples('maskroute history', 'maskroute history --tenant acme --limit 5 --json'))
    .action(async ({ edge, tenant, json, limit }: Flags & { limit: number }) => {
      const client = await adminClient(edge);
      const publications = await publicationHistory(client, tenant, limit);
      const versions = publications.flatMap(({ version }) => version ?? []);
      const names = await namesOfVersions(client, tenant, versions);
      const named = publications.map((publication) => ({
        ...publication,
        name: nameIn(names, publication.version),
      }));
      if (json) return console.log(JSON.stringify(named));
      if (named.length === 0) console.log(`Nothing was published for ${whose(tenant)} at ${client.edge}.`);
      for (const line of named.map(describePublication)) console.log(line);
    });
}

type Status = {
  readonly edge: string;
  readonly tenant: string;
  /** Null: nothing of the tenant's own; requests run dense, or under the default mask set. */
  readonly live: (LivePublication & { readonly name: string | null }) | null;
  /** Null with a tenant's own admin key, which may not see backends. */
  readonly backends: readonly (BackendEntry & Learning)[] | null;
};

/** Null when the backend does not answer. */
type Learning = { readonly jobs: readonly Job[] | null; readonly schedules: readonly Schedule[] | null };

async function readStatus(client: AdminClient, tenant: string): Promise<Status> {
  const live = await livePublication(client, tenant);
  const names =
    live === undefined ? new Map<string, string>() : await namesOfVersions(client, tenant, [live.version]);
  return {
    edge: client.edge,
    tenant,
    live: live === undefined ? null : { ...live, name: nameIn(names, live.version) },
    backends: await readBackends(client),
  };
}

const nameIn = (names: ReadonlyMap<string, string>, version: string | null): string | null =>
  version === null ? null : (names.get(version) ?? null);

async function readBackends(client: AdminClient): Promise<Status['backends']> {
  const list = await client
    .request({ method: 'GET', path: '/backends' }, listSchema(backendSchema))
    .catch((error: unknown) => {
      if (!isCode(error, 'forbidden')) throw error;
    });
  if (list === undefined) return null;
  return await Promise.all(
    list.data.map(async (backend) => {
      const path = `/backends/${backend.id}/jobs`;
      const [jobs, schedules] = await Promise.all([
        listed(client, path, jobSchema),
        listed(client, `${path}/schedules`, scheduleSchema),
      ]);
      return { ...backend, jobs, schedules };
    }),
  );
}

/**
 * Null when it cannot be read, so that one backend without an answer does not fail the command. Empty for a backend that
 * leaves its jobs to another one of the same home.
 */
const listed = <T extends z.ZodType>(client: AdminClient, path: string, item: T) =>
  client.request({ method: 'GET', path }, listSchema(item)).then(
    ({ data }) => data as z.output<T>[],
    (error: unknown) => (isCode(error, 'not_found') ? [] : null),
  );

const isCode = (error: unknown, code: MaskrouteError['code']): boolean =>
  error instanceof MaskrouteError && error.code === code;

function describeStatus({ edge, tenant, live, backends }: Status): string {
  return [
    `Edge      ${edge}`,
    `For       ${whose(tenant)}`,
    `Live      ${live === null ? 'nothing: requests run dense, or by the default mask set' : describeLive(live)}`,
    ...(backends === null
      ? ['Backends  visible only with a key of kind admin']
      : backends.flatMap(describeBackend)),
  ].join('\n');
}

function describeLive({
  name,
  version,
  share,
  base_version,
  activate_at,
}: NonNullable<Status['live']>): string {
  const set = `${name} ${version}`;
  const others = base_version === null ? 'dense' : base_version;
  if (share === 1) return `${set}, for everyone since ${activate_at}`;
  if (share > 0) return `${set}, for ${percent(share)} of conversations; the others see ${others}`;
  return `${others}; ${set} is scheduled for ${activate_at}`;
}

function describeBackend(backend: NonNullable<Status['backends']>[number]): string[] {
  const { id, url, enabled, state, jobs, schedules } = backend;
  const health = !enabled
    ? 'switched off'
    : state.breaker === 'closed'
      ? 'taking requests'
      : `breaker ${state.breaker}`;
  const load = state.running === null ? '' : `, ${state.running} running, ${state.waiting} waiting`;
  return [
    `Backend   ${id} at ${url}: ${health}${load}`,
    ...(jobs === null
      ? ['  jobs    unknown: the backend does not answer']
      : jobs.filter(isOpen).map((job) => `  job     ${describeJob(job)}`)),
    ...(schedules ?? []).map(({ id, every, next_at }) => `  again   ${id} every ${every}, next ${next_at}`),
  ];
}

const isOpen = ({ status }: Job): boolean => status === 'waiting' || status === 'running';

function describeJob({ id, status, progress }: Job): string {
  return progress === null
    ? `${id} ${status}`
    : `${id} ${status}: ${progress.stage}, ${progress.done} of ${progress.total}`;
}

type Named = Publication & { readonly name: string | null };

function describePublication({
  created_at,
  action,
  name,
  version,
  replaced_version,
  actor,
  reason,
  ...how
}: Named): string {
  const what = version === null ? 'nothing is live' : `${name} ${version}`;
  const place =
    replaced_version === null || replaced_version === version ? '' : ` in place of ${replaced_version}`;
  const steps = how.rollout.length;
  const gradual = steps > 0 ? `, in ${steps} step${steps === 1 ? '' : 's'}` : '';
  const later = how.activate_at > created_at ? `, from ${how.activate_at}` : '';
  return `${created_at}  ${action.padEnd(8)}  ${what}${place}${later}${gradual}, by ${actor}${reason === null ? '' : `: ${reason}`}`;
}

const percent = (share: number): string => `${Number((share * 100).toFixed(2))} %`;
