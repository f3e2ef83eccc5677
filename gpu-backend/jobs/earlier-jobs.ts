/**
 * What a job takes from the jobs before it: the mask set that it begins with, and what an equal job had computed when it
 * failed or was cancelled.
 */
import { cp, rename, rm } from 'node:fs/promises';
import { isFinished, type Job, type JobRequest } from '../../shared/admin/job-wire.ts';
import { canonicalJson, type MaskSet, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { openInstalled, sha256OfFiles } from '../model/store.ts';
import { readMaskSet } from '../publication/publish.ts';
import type { JobStore } from './job-store.ts';

type EarlierJobs = {
  /** All jobs of the home, the newest first. */
  readonly jobs: readonly Job[];
  readonly store: JobStore;
  readonly home: string;
};

/** A job that begins, the files of its data, and the file of the mask set that it begins with. */
type BegunJob = {
  readonly job: Job;
  readonly files: readonly string[];
  readonly from: string | undefined;
};

/**
 * The file of the mask set that a job begins with. A set that `learn` would refuse, for example for other weights than those
 * installed by now, is passed over: else every later job of a schedule would fail.
 */
export async function setToBeginWith(request: JobRequest, earlier: EarlierJobs): Promise<string | undefined> {
  const { jobs, store } = earlier;
  const { from } = request;
  if (from !== 'last') return from && store.setOf(from);
  const isAlike = (job: Job) => job.status === 'succeeded' && learnsAlike(job.request, request);
  for (const { id } of jobs.filter(isAlike)) {
    const set = await store.readSet(id).catch(() => undefined);
    if (set !== undefined && (await isForInstalled(set, request, earlier, mayBegin))) return store.setOf(id);
  }
  return undefined;
}

/**
 * Takes what an equal job computed before it failed or was cancelled. If it had learned, and only did not publish, that
 * is its mask set, if `learn` would learn it from the same today. Else, for example for lack of memory, `learn` goes
 * on from there, and drops what no longer fits. A job of a schedule also takes the set of the schedule's earlier jobs if
 * their data was the same, even if they succeeded: learned again, it would have another date, and perhaps another `from`,
 * so it would be another version.
 * @returns the id of the job from which it took something, if there is any. Rejects when `signal` aborts while it reads data.
 */
export async function takeOver(
  begun: BegunJob,
  earlier: EarlierJobs,
  signal: AbortSignal,
): Promise<string | undefined> {
  const { job, files } = begun;
  const { jobs, store } = earlier;
  const equal = jobs.filter((one) => isFinished(one) && asksOf(one.request) === asksOf(job.request));
  const isOfSameData = dataCheck(job.request, files, signal);
  // A whole set of an older job is worth more than a part of a newer one.
  for (const one of equal) {
    if (!(await wouldLearnSetOf(one, begun, earlier, isOfSameData))) continue;
    await copySet(store.outOf(one.id), store.outOf(job.id));
    return one.id;
  }
  for (const { id } of equal) {
    if (!(await store.hasSet(id)) && (await movePart(store.outOf(id), store.outOf(job.id)))) return id;
  }
  return undefined;
}

/** The earlier job keeps its set, which others may begin with. A kill leaves no half of a copy. */
async function copySet(from: string, to: string): Promise<void> {
  await rm(`${to}.part`, { recursive: true, force: true });
  await cp(from, `${to}.part`, { recursive: true });
  await rename(`${to}.part`, to);
}

/** False where the earlier job never began, or another job has taken its results over. */
const movePart = (from: string, to: string): Promise<boolean> =>
  rename(from, to).then(
    () => true,
    () => false,
  );

/** Whether the job would learn the set of `other`, an equal one; if both are of a schedule, from the same data at least. */
async function wouldLearnSetOf(
  other: Job,
  { job, from }: BegunJob,
  earlier: EarlierJobs,
  isOfSameData: DataCheck,
): Promise<boolean> {
  const isOfSchedule = job.schedule !== null && other.schedule === job.schedule;
  if (other.status === 'succeeded' && !isOfSchedule) return false;
  const set = await earlier.store.readSet(other.id).catch(() => undefined);
  if (set === undefined || !(await isForInstalled(set, job.request, earlier, hasTable))) return false;
  const beginsAlike = async () => set.learned.from === (from && maskSetVersion(await readMaskSet(from)));
  return (isOfSchedule || (await beginsAlike())) && (await isOfSameData(set));
}

/** `table`: the surrogates that `learn` will use, if any. */
type Suits = (set: MaskSet, table: string | undefined) => boolean;

const hasTable: Suits = (set, table) => set.surrogates === table;
/** `learn` takes masks over to another table. */
const mayBegin: Suits = (set, table) => set.surrogate === (table !== undefined);

/** Whether the mask set is for the installed model, also if that cannot be opened: `learn` says what is wrong with it. */
async function isForInstalled(
  set: MaskSet,
  { model, surrogate }: JobRequest,
  { home }: EarlierJobs,
  suits: Suits,
): Promise<boolean> {
  const installed = await openInstalled(home, model!).catch(() => undefined);
  if (installed === undefined) return true;
  const { hash, surrogates } = installed.manifest;
  return set.model.hash === hash && suits(set, surrogate === false ? undefined : surrogates?.id);
}

/** Fields in which a request must equal the job whose mask set it begins with. */
const ALIKE = ['name', 'model', 'sparsity', 'cost', 'context', 'surrogate'] as const;
const learnsAlike = (a: JobRequest, b: JobRequest): boolean => ALIKE.every((field) => a[field] === b[field]);

/** What a request asks `learn` to do, as text. */
const asksOf = ({ publish: _, ...asked }: JobRequest): string => canonicalJson(asked);

/** Whether a set was learned from a job's data. */
type DataCheck = (set: MaskSet) => Promise<boolean>;

/** The data of `request`, `files`, are read once, and only if they have to be. Rejects when `signal` aborts. */
function dataCheck(request: JobRequest, files: readonly string[], signal: AbortSignal): DataCheck {
  // Uploads are named by their content, and equal requests name equal ones. A file of the open folder may have changed.
  if (request.data.every((source) => 'upload' in source)) return async () => true;
  let hash: string | undefined;
  return async ({ learned }) => {
    hash ??= await sha256OfFiles(files, signal);
    return learned.dataHash === hash;
  };
}
