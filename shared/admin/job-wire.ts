/**
 * Jobs of a backend: learning masks for a team's data while it serves, and publishing them. For holders of the
 * backend key.
 *
 * | method and path | body | answer |
 * |---|---|---|
 * | `POST /v1/jobs/data?name=`   | JSONL                        | 201 {@link UploadedData}; the same content again is 200 |
 * | `GET /v1/jobs/data`          |                              | list of {@link UploadedData} |
 * | `DELETE /v1/jobs/data/{id}`  |                              | `{ id, deleted: true }`; 409 while a job needs it |
 * | `POST /v1/jobs`              | {@link createJobSchema}      | 202 {@link Job}; 429 when too many wait |
 * | `GET /v1/jobs?q=`            |                              | list of {@link Job}, newest first |
 * | `GET /v1/jobs/{id}`          |                              | {@link Job} |
 * | `GET /v1/jobs/{id}/events`   |                              | SSE: `job` events, each a whole {@link Job}; ends with the job |
 * | `POST /v1/jobs/{id}/cancel`  |                              | {@link Job}; again is the same |
 * | `GET /v1/jobs/{id}/mask-set` |                              | the learned mask set |
 * | `GET /v1/jobs/{id}/report`   |                              | its report |
 * | `POST /v1/jobs/schedules`    | {@link createScheduleSchema} | 201 {@link Schedule}; 429 when there are too many |
 * | `GET /v1/jobs/schedules`     |                              | list of {@link Schedule}, newest first |
 * | `GET /v1/jobs/schedules/{id}` |                             | {@link Schedule} |
 * | `DELETE /v1/jobs/schedules/{id}` |                          | `{ id, deleted: true }`; its jobs stay |
 *
 * The edge offers its own administrators most of these under `/admin/v1/backends/{backend}`: `/jobs`, `/jobs/data`,
 * `/jobs/{id}`, `/jobs/{id}/events`, `/jobs/{id}/cancel`, `/jobs/schedules` and `/jobs/schedules/{id}`. A job takes a
 * machine that all tenants share and reads what its operator opened, so a tenant's own admin key starts none. A job that is
 * started there takes no admin key to the backend: `POST /jobs/{id}/store` with {@link storeJobSchema} stores what was
 * learned, and it goes live as every mask set does. A schedule takes one along where its jobs publish, for that edge alone.
 */
import { z } from 'zod';
import { DEFAULT_TENANT, ownerId, timestamp } from './admin-wire.ts';
import { autoRollbackSchema, rolloutSchema } from './publication-wire.ts';

export const JOB_ID_PATTERN = /^job_[0-9a-f]{24}$/;
export const SCHEDULE_ID_PATTERN = /^schedule_[0-9a-f]{24}$/;
export const DATA_ID_PATTERN = /^data_[0-9a-f]{24}$/;
/** The name becomes the kind of its rows, and a file's name. */
export const DATA_NAME_PATTERN = /^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$/;
export const JOBS_WAITING_MAX = 8;
export const SCHEDULES_MAX = 32;

const dataSource = z.union([
  z.strictObject({ upload: z.string().regex(DATA_ID_PATTERN, 'expected the id of uploaded data') }),
  /** Below the folder that the backend's operator opened for this, if any. */
  z.strictObject({ path: z.string().min(1).max(500) }),
]);

/** What is published, and how. */
const publishing = {
  tenant: ownerId.default(DEFAULT_TENANT),
  activate: z.boolean().default(false),
  /** The steps on the way to everyone, and when the edge takes the version back by itself: as of any publication. */
  rollout: rolloutSchema.optional(),
  auto_rollback: autoRollbackSchema.optional(),
};
const publishTo = { edge: z.url({ protocol: /^https?$/ }).max(500), ...publishing };
/** Used once by each job; kept sealed until then, and shown to nobody. */
const adminKey = z.string().min(1).max(500);
type Publishing = {
  readonly activate: boolean;
  readonly rollout?: unknown;
  readonly auto_rollback?: unknown;
};
const isActivated = ({ activate, rollout, auto_rollback }: Publishing): boolean =>
  activate || (rollout === undefined && auto_rollback === undefined);
const ONLY_ACTIVATED = { message: 'a rollout and bounds go with activate: true', path: ['activate'] };

export const createJobSchema = z.strictObject({
  kind: z.literal('learn'),
  /** An installed model; the served model unless given. */
  model: z.string().min(1).max(200).optional(),
  data: z.array(dataSource).min(1).max(64),
  clusters: z.union([z.int().min(1).max(256), z.literal('auto')]),
  sparsity: z.number().gt(0).lt(1),
  /** How many masks the clusters share at most; as many as pay unless given. */
  masks: z.int().min(1).max(256).optional(),
  cost: z.enum(['blocks', 'time']).optional(),
  /** With `cost: "time"`: tokens before the timed token. */
  context: z.int().min(1).max(1_000_000).optional(),
  surrogate: z.boolean().optional(),
  /**
   * The job whose set it begins with, instead of searching for masks. `last`: the newest one of the same name, model, sparsity,
   * cost, context and surrogates; a job without any before it searches.
   */
  from: z
    .union([z.literal('last'), z.string().regex(JOB_ID_PATTERN, 'expected "last" or the id of a job')])
    .optional(),
  encoder: z.enum(['static', 'all-minilm-l6-v2']).default('static'),
  name: z.string().regex(DATA_NAME_PATTERN).optional(),
  rows: z.int().min(1).max(10_000_000).optional(),
  seed: z.int().min(0).optional(),
  publish: z
    .strictObject({ ...publishTo, admin_key: adminKey })
    .refine(isActivated, ONLY_ACTIVATED)
    .optional(),
});
export type CreateJob = z.infer<typeof createJobSchema>;

/** What the edge takes: publishing is the edge's own matter. */
export const createEdgeJobSchema = createJobSchema.omit({ publish: true });
export type CreateEdgeJob = z.infer<typeof createEdgeJobSchema>;

export const storeJobSchema = z.strictObject({
  /** Whose set it will be. */
  tenant: publishing.tenant,
});

const jobRequestSchema = createEdgeJobSchema.extend({ publish: z.strictObject(publishTo).optional() });
export type JobRequest = z.infer<typeof jobRequestSchema>;

const JOB_STATES = ['waiting', 'running', 'succeeded', 'failed', 'cancelled'] as const;

export const jobSchema = z.object({
  id: z.string(),
  object: z.literal('maskroute.job'),
  status: z.enum(JOB_STATES),
  request: jobRequestSchema,
  /** The schedule that asked for it. */
  schedule: z.string().nullable().default(null),
  created_at: timestamp,
  started_at: timestamp.nullable(),
  finished_at: timestamp.nullable(),
  /** How often it was begun. After a restart of the backend a job goes on where it was. */
  starts: z.int(),
  progress: z
    .object({
      stage: z.string(),
      done: z.number(),
      total: z.number(),
      /** At the pace so far. */
      left_s: z.number().nullable(),
      detail: z.string(),
    })
    .nullable(),
  /** Why it failed. */
  error: z.string().nullable(),
  result: z
    .object({
      version: z.string(),
      /** What publishing said; null when that was not asked for. */
      published: z.string().nullable(),
    })
    .nullable(),
});
export type Job = z.infer<typeof jobSchema>;
export type JobProgress = NonNullable<Job['progress']>;

export const isFinished = ({ status }: Pick<Job, 'status'>): boolean =>
  status === 'succeeded' || status === 'failed' || status === 'cancelled';

/* Schedules: the same job again and again, on what its data then hold. */

const EVERY_s = { m: 60, h: 3600, d: 86_400 } as const;
const EVERY_MAX_s = 366 * EVERY_s.d;

/** `30m`, `24h`, `7d` in seconds; NaN for other text. */
export function secondsOf(every: string): number {
  const [, count, unit] = /^(\d{1,6})([mhd])$/.exec(every) ?? [];
  return Number(count) * EVERY_s[unit as keyof typeof EVERY_s];
}

const everySchema = z.string().refine((every) => secondsOf(every) >= 60 && secondsOf(every) <= EVERY_MAX_s, {
  message: 'expected minutes, hours or days, at most a year: 30m, 24h, 7d',
});

export const createScheduleSchema = z.strictObject({
  every: everySchema,
  /** When the first job begins; one span from now unless given. */
  first_at: timestamp.optional(),
  job: createJobSchema,
});
export type CreateSchedule = z.infer<typeof createScheduleSchema>;

/** What the edge takes: what its backends learn is published at itself. */
export const createEdgeScheduleSchema = createScheduleSchema.extend({
  job: createEdgeJobSchema.extend({
    publish: z
      .strictObject({ ...publishing, admin_key: adminKey })
      .refine(isActivated, ONLY_ACTIVATED)
      .optional(),
  }),
});

export const scheduleSchema = z.object({
  id: z.string(),
  object: z.literal('maskroute.schedule'),
  every: everySchema,
  job: jobRequestSchema,
  created_at: timestamp,
  /** When the next job begins. Times that passed while the backend was away, or while a job ran, are made up for by one job. */
  next_at: timestamp,
  /** The newest of its jobs; null before the first. */
  last_job: z.string().nullable(),
});
export type Schedule = z.infer<typeof scheduleSchema>;

export const uploadedDataSchema = z.object({
  id: z.string(),
  name: z.string(),
  bytes: z.int(),
  created_at: timestamp,
});
export type UploadedData = z.infer<typeof uploadedDataSchema>;
