/**
 * Starting and stopping experiments. A draft is checked when it is started, and refused if it overlaps another
 * experiment.
 */
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import { DENSE_VARIANT } from '../../shared/admin/experiment-wire.ts';
import { overlap } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { Hold } from '../base/waiting.ts';
import { d1 } from '../db/d1.ts';
import {
  findExperiment,
  listStarted,
  type StoredExperiment,
  scopeOf,
  startExperiment,
  stopExperiment,
} from '../db/experiment-rows.ts';
import {
  EXPERIMENT_SETS_MAX,
  EXPERIMENTS_RUNNING_MAX,
  TENANT_EXPERIMENT_SETS_MAX,
  TENANT_EXPERIMENTS_RUNNING_MAX,
} from '../limits.ts';
import type { RunningExperiments } from '../routing/assignment.ts';
import { checkPublishable, type PublishDependencies } from './publishing.ts';

type ExperimentDependencies = PublishDependencies & { readonly experiments: RunningExperiments };

/**
 * Starts a draft, now or at its own start time.
 * @throws MaskrouteError `conflict` when it was started before, is over, overlaps another, another one was started at
 * the same moment, or too many run or have too many mask sets; as `requireReadable`; as `checkPublishable` for each variant.
 */
export async function start(
  dependencies: ExperimentDependencies,
  draft: StoredExperiment,
  hold: Hold,
): Promise<StoredExperiment> {
  const { db } = dependencies;
  if (draft.startsAt_ms !== null) throw new MaskrouteError('conflict', `${draft.id} was started before.`);
  requireReadable(draft);
  for (const { mask_set } of draft.definition.variants) {
    if (mask_set === DENSE_VARIANT) continue;
    await checkPublishable(dependencies, { tenant: draft.owner, version: mask_set, hold });
  }
  const now_ms = Date.now();
  const times = startTimes(draft, now_ms);
  const seen = await d1(listStarted(db, now_ms));
  requirePlace(draft.owner, seen.experiments);
  requireRoomForSets(draft, seen.experiments);
  const scope = scopeOf({ ...draft, ...times });
  const other = seen.experiments.find((candidate) => overlap(scope, scopeOf(candidate)));
  if (other !== undefined) throw overlapping(draft, other);
  const started = await d1(startExperiment(db, draft, times, seen.revision));
  if (started === null) {
    throw new MaskrouteError(
      'conflict',
      'It was changed, or another one was started or stopped meanwhile; try again.',
    );
  }
  await dependencies.experiments.refresh(hold).catch(() => {});
  return started;
}

/** @throws MaskrouteError `conflict` when another version of the edge wrote it, and this one cannot read it. */
export function requireReadable({ id, unreadable }: StoredExperiment): void {
  if (unreadable === null) return;
  const message = `Another version of the edge wrote ${id}, and this one cannot read it: ${unreadable}.`;
  throw new MaskrouteError('conflict', message);
}

/** Experiments that start later count, too, as they are in every isolate's list. */
function requirePlace(owner: string, started: readonly StoredExperiment[]): void {
  const full = (most: number) => new MaskrouteError('conflict', `${most} experiments run already; stop one.`);
  if (started.length >= EXPERIMENTS_RUNNING_MAX) throw full(EXPERIMENTS_RUNNING_MAX);
  if (owner === DEFAULT_TENANT) return;
  const own = started.filter((experiment) => experiment.owner === owner).length;
  if (own >= TENANT_EXPERIMENTS_RUNNING_MAX) throw full(TENANT_EXPERIMENTS_RUNNING_MAX);
}

function requireRoomForSets(draft: StoredExperiment, started: readonly StoredExperiment[]): void {
  const own = started.filter(({ owner }) => owner === draft.owner);
  const bounds: [readonly StoredExperiment[], number][] = [[started, EXPERIMENT_SETS_MAX]];
  if (draft.owner !== DEFAULT_TENANT) bounds.push([own, TENANT_EXPERIMENT_SETS_MAX]);
  for (const [others, most] of bounds) {
    const count = setsOf([...others, draft]).size;
    if (count <= most) continue;
    const message = `Experiments that run have at most ${most} mask sets in all; with this one it would be ${count}.`;
    throw new MaskrouteError('conflict', message, { param: 'variants' });
  }
}

/** The distinct versions, without dense. */
const setsOf = (experiments: readonly StoredExperiment[]): Set<string> =>
  new Set(
    experiments.flatMap(({ definition }) =>
      definition.variants.map(({ mask_set }) => mask_set).filter((set) => set !== DENSE_VARIANT),
    ),
  );

function startTimes({ id, definition: { starts_at, ends_at } }: StoredExperiment, now_ms: number) {
  const startsAt_ms = Math.max(now_ms, starts_at === undefined ? 0 : Date.parse(starts_at));
  const endsAt_ms = ends_at === undefined ? null : Date.parse(ends_at);
  if (endsAt_ms !== null && endsAt_ms <= startsAt_ms) {
    throw new MaskrouteError('conflict', `${id} would be over before it starts.`, { param: 'ends_at' });
  }
  return { startsAt_ms, endsAt_ms };
}

/** Another tenant's experiment must not be named. */
function overlapping(draft: StoredExperiment, other: StoredExperiment): MaskrouteError {
  const named = draft.owner === DEFAULT_TENANT || draft.owner === other.owner;
  const which = named ? `the experiment ${other.id}` : 'an experiment of the platform';
  return new MaskrouteError('conflict', `Requests of ${draft.id} take part in ${which} already.`);
}

/** @throws MaskrouteError `conflict` for a draft. */
export async function stop(
  { db, experiments }: Pick<ExperimentDependencies, 'db' | 'experiments'>,
  experiment: StoredExperiment,
  hold: Hold,
): Promise<StoredExperiment> {
  if (experiment.startsAt_ms === null) {
    throw new MaskrouteError('conflict', `${experiment.id} was not started.`);
  }
  await d1(stopExperiment(db, experiment, Date.now()));
  await experiments.refresh(hold).catch(() => {});
  return (await d1(findExperiment(db, experiment)))!;
}
