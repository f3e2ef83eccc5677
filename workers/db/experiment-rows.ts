/**
 * Experiments in D1. The caller checks for overlaps on what it has read; a start is written only if no experiment
 * changed since (optimistic locking by revision), so of two overlapping experiments only one starts.
 */
import { and, desc, eq, gt, isNotNull, isNull, or, type SQL, sql } from 'drizzle-orm';
import type { PageQuery } from '../../shared/admin/admin-wire.ts';
import {
  type Experiment,
  type ExperimentDefinition,
  experimentDefinitionSchema,
  readablePart,
} from '../../shared/admin/experiment-wire.ts';
import type { Scope } from '../../shared/mask/sticky.ts';
import { check } from '../../shared/wire/parse-body.ts';
import {
  type Database,
  firstOf,
  holds,
  isIfGiven,
  isoTime,
  isoTimeOrNull,
  orConflict,
  type Page,
  pastCursor,
  storedJson,
  toPage,
} from './d1.ts';
import type { ExperimentKey } from './outcomes.ts';
import { experiments } from './schema.ts';

type ExperimentRow = typeof experiments.$inferSelect;

export type StoredExperiment = Readonly<Omit<ExperimentRow, 'definition' | 'revision'>> & {
  readonly definition: ExperimentDefinition;
  /** Why the definition has only a part of what is stored; null: it has all of it. */
  readonly unreadable: string | null;
  /** The stored JSON text: starting a draft requires the text that was checked. */
  readonly definitionText: string;
};

/** The revision of all experiments; every change increments it. */
const newest = sql<number>`coalesce(max(${experiments.revision}), 0)`;
const revision = sql`(select ${newest} from ${experiments})`;
const nextRevision = sql`${revision} + 1`;

/** @throws MaskrouteError `conflict` when the owner has one of this id. */
export async function insertExperiment(
  db: Database,
  draft: Pick<StoredExperiment, 'id' | 'owner' | 'definition' | 'createdAt_ms' | 'actor'>,
): Promise<StoredExperiment> {
  const { definition, ...columns } = draft;
  const definitionText = JSON.stringify(definition);
  const inserting = db.insert(experiments).values({ ...columns, definition: definitionText, revision: 0 });
  await orConflict(inserting, `There is an experiment ${draft.id} already.`);
  return {
    ...draft,
    definitionText,
    unreadable: null,
    startsAt_ms: null,
    endsAt_ms: null,
    stoppedAt_ms: null,
  };
}

export const findExperiment = (db: Database, key: ExperimentKey): Promise<StoredExperiment | null> =>
  firstOf(db.select().from(experiments).where(named(key)), toStored);

/** At most two experiments with this id, of any owner, the one without a tenant first. */
export async function findExperimentsOfAnybody(db: Database, id: string): Promise<StoredExperiment[]> {
  const rows = await db
    .select()
    .from(experiments)
    .where(eq(experiments.id, id))
    .orderBy(experiments.owner)
    .limit(2);
  return rows.map(toStored);
}

/** Newest first, of one owner when one is given. */
export async function listExperiments(
  db: Database,
  owner: string | undefined,
  { before, limit, q }: PageQuery,
): Promise<Page<StoredExperiment>> {
  const { id, createdAt_ms } = experiments;
  const name = sql`${id} || '.' || ${experiments.owner}`;
  const rows = await db
    .select()
    .from(experiments)
    .where(
      and(
        isIfGiven(experiments.owner, owner),
        holds(q, id, experiments.owner),
        pastCursor(createdAt_ms, name, before),
      ),
    )
    .orderBy(desc(createdAt_ms), name)
    .limit(limit + 1);
  return toPage(rows, limit, (row) => ({ at: row.createdAt_ms, id: `${row.id}.${row.owner}` }), toStored);
}

/** Started experiments that have not ended at `now_ms`, and the revision at which they were read. */
export async function listStarted(
  db: Database,
  now_ms: number,
): Promise<{ experiments: StoredExperiment[]; revision: number }> {
  const [rows, revisions] = await db.batch([
    db
      .select()
      .from(experiments)
      .where(and(isNotNull(experiments.startsAt_ms), isNull(experiments.stoppedAt_ms), isNotOver(now_ms))),
    db.select({ revision: newest }).from(experiments),
  ]);
  return { experiments: rows.map(toStored), revision: revisions[0]!.revision };
}

/** Null when it is no longer a draft, was changed, or any experiment changed since `seenRevision`. */
export function startExperiment(
  db: Database,
  { definitionText, ...key }: ExperimentKey & Pick<StoredExperiment, 'definitionText'>,
  times: { readonly startsAt_ms: number; readonly endsAt_ms: number | null },
  seenRevision: number,
): Promise<StoredExperiment | null> {
  const isAsSeen = and(isDraftOf(key, definitionText), sql`${revision} = ${seenRevision}`);
  const starting = db.update(experiments).set({ ...times, revision: nextRevision });
  return firstOf(starting.where(isAsSeen).returning(), toStored);
}

/** Sets the stop time, once; none for an experiment that is over. */
export async function stopExperiment(db: Database, key: ExperimentKey, now_ms: number): Promise<void> {
  await db
    .update(experiments)
    .set({ stoppedAt_ms: now_ms, revision: nextRevision })
    .where(and(named(key), isNull(experiments.stoppedAt_ms), isNotOver(now_ms)));
}

/** False when it is no longer a draft, or was changed since its text was read. */
export async function changeDraft(
  db: Database,
  { definitionText, ...key }: ExperimentKey & Pick<StoredExperiment, 'definitionText'>,
  definition: ExperimentDefinition,
): Promise<boolean> {
  const rows = await db
    .update(experiments)
    .set({ definition: JSON.stringify(definition) })
    .where(isDraftOf(key, definitionText))
    .returning({ id: experiments.id });
  return rows.length > 0;
}

/** False when it is not a draft: started experiments are kept, with their results. */
export async function deleteDraft(db: Database, key: ExperimentKey): Promise<boolean> {
  const rows = await db
    .delete(experiments)
    .where(and(named(key), isNull(experiments.startsAt_ms)))
    .returning({ id: experiments.id });
  return rows.length > 0;
}

/** The scope of a started experiment. */
export const scopeOf = (experiment: StoredExperiment): Scope => ({
  tenants: experiment.owner === '' ? experiment.definition.tenants : [experiment.owner],
  models: experiment.definition.models,
  regions: experiment.definition.regions,
  startsAt_ms: experiment.startsAt_ms ?? Number.POSITIVE_INFINITY,
  endsAt_ms: experiment.stoppedAt_ms ?? experiment.endsAt_ms ?? Number.POSITIVE_INFINITY,
});

export const toExperiment = (experiment: StoredExperiment, now_ms: number): Experiment => ({
  id: experiment.id,
  tenant: experiment.owner,
  ...experiment.definition,
  state: stateOf(experiment, now_ms),
  created_at: isoTime(experiment.createdAt_ms),
  started_at: isoTimeOrNull(experiment.startsAt_ms),
  stopped_at: isoTimeOrNull(experiment.stoppedAt_ms),
  actor: experiment.actor,
  ...(experiment.unreadable === null ? {} : { unreadable: experiment.unreadable }),
});

function stateOf(
  { startsAt_ms, endsAt_ms, stoppedAt_ms }: StoredExperiment,
  now_ms: number,
): Experiment['state'] {
  if (startsAt_ms === null) return 'draft';
  if (stoppedAt_ms !== null) return 'stopped';
  if (now_ms < startsAt_ms) return 'scheduled';
  return endsAt_ms !== null && endsAt_ms <= now_ms ? 'ended' : 'running';
}

const isNotOver = (now_ms: number): SQL | undefined =>
  or(isNull(experiments.endsAt_ms), gt(experiments.endsAt_ms, now_ms));

/** Whether it is still the draft whose text was read. */
const isDraftOf = (key: ExperimentKey, definitionText: string): SQL | undefined =>
  and(named(key), eq(experiments.definition, definitionText), isNull(experiments.startsAt_ms));

const named = ({ owner, id }: ExperimentKey) => and(eq(experiments.owner, owner), eq(experiments.id, id));

/** A row that another version of the edge wrote must not hide the others. */
function toStored({ definition, revision: _, ...row }: ExperimentRow): StoredExperiment {
  const stored = storedJson(definition);
  const checked = check(experimentDefinitionSchema, stored, 'the experiment');
  const known = { ...row, definitionText: definition };
  if (checked.kind === 'good') return { ...known, definition: checked.value, unreadable: null };
  return { ...known, definition: readablePart(stored), unreadable: checked.message };
}
