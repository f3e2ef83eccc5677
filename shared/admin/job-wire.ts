/**
 * Jobs of a backend: learn masks from a team's data while the backend serves, and publish them. For holders of the
 * backend key.
 *
 * | method and path | body | answer |
 * |---|---|---|
 * | `POST /v1/jobs/data?name=` | JSONL | 201 {@link UploadedData}; the same content again is 200 |
 * | `GET /v1/jobs/data`          |                              | list of {@link UploadedData} |
 * | `DELETE /v1/jobs/data/{id}` | | `{ id, deleted: true }`; 409 while a job needs it |
 * | `POST /v1/jobs`              | {@link createJobSchema}      | 202 {@link Job}; 429 when too many wait |
 * | `GET /v1/jobs?q=`            |                              | list of {@link Job}, newest first |
 * | `GET /v1/jobs/{id}`          |                              | {@link Job} |
 * | `GET /v1/jobs/{id}/events` | | SSE: `job` events, each a whole {@link Job}; ends with the job |
 * | `POST /v1/jobs/{id}/cancel` | | {@link Job}; may be repeated |
 * | `GET /v1/jobs/{id}/mask-set` |                              | the learned mask set |
 * | `GET /v1/jobs/{id}/report`   |                              | its report |
 * | `POST /v1/jobs/schedules`    | {@link createScheduleSchema} | 201 {@link Schedule}; 429 when there are too many |
 * | `GET /v1/jobs/schedules`     |                              | list of {@link Schedule}, newest first |
 * | `GET /v1/jobs/schedules/{id}` |                             | {@link Schedule} |
 * | `DELETE /v1/jobs/schedules/{id}` |                          | `{ id, deleted: true }`; its jobs stay |
 *
 * The edge offers most of these to its administrators under `/admin/v1/backends/{backend}`: `/jobs`, `/jobs/data`,
 * `/jobs/{id}`, `/jobs/{id}/events`, `/jobs/{id}/cancel`, `/jobs/schedules` and `/jobs/schedules/{id}`. A job uses a
 * machine that all tenants share and reads files that its operator opened, so a tenant's own admin key may not start
 * one. Jobs started through the edge send no admin key to the backend: `POST /jobs/{id}/store` with {@link
 * storeJobSchema} stores the learned set, which is then published like any other. Only a schedule whose jobs publish
 * gives the backend an admin key, for that edge alone.
 */
import { z } from 'zod';
import { DEFAULT_TENANT, ownerId, sentKey, timestamp } from './admin-wire.ts';
import { autoRollbackSchema, rolloutSchema } from './publication-wire.ts';

export const JOB_ID_PATTERN = /^job_[0-9a-f]{24}$/;
export const SCHEDULE_ID_PATTERN = /^schedule_[0-9a-f]{24}$/;
export const DATA_ID_PATTERN = /^data_[0-9a-f]{24}$/;
/** A name of uploaded data; it becomes the kind of the data's rows, and part of a file name. */
export const DATA_NAME_PATTERN = /^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$/;
export const JOBS_WAITING_MAX = 8;
export const SCHEDULES_MAX = 32;

const dataName = z.string().regex(DATA_NAME_PATTERN, 'expected letters, digits, _ and -, at most 64');

/** The query of an upload. */
export const uploadQuerySchema = z.strictObject({ name: dataName.default('data') });

const dataSource = z.union([
  z.strictObject({ upload: z.string().regex(DATA_ID_PATTERN, 'expected the id of uploaded data') }),
  /** Path below the folder that the backend's operator opened for jobs, if any. */
  z.strictObject({ path: z.string().min(1).max(500) }),
]);

/** How the learned set is published. */
const publishing = {
  tenant: ownerId.default(DEFAULT_TENANT),
  activate: z.boolean().default(false),
  /** Rollout steps and automatic rollback, as for any publication. */
  rollout: rolloutSchema.optional(),
  auto_rollback: autoRollbackSchema.optional(),
};
const publishTo = { edge: z.url({ protocol: /^https?$/ }).max(500), ...publishing };
/** Kept encrypted until the job ends or the schedule is removed, and never shown. */
const adminKey = sentKey.max(500);
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
  /** Most masks that clusters share; absent: as many as pay off. */
  masks: z.int().min(1).max(256).optional(),
  cost: z.enum(['blocks', 'time']).optional(),
  /** With `cost: "time"`: tokens before the timed token. */
  context: z.int().min(1).max(1_000_000).optional(),
  surrogate: z.boolean().optional(),
  /**
   * The job whose mask set it begins with instead of searching. `last`: the newest succeeded job with the same name,
   * model, sparsity, cost and context, with surrogates if it has them, too; if there is none, the job searches.
   */
  from: z
    .union([z.literal('last'), z.string().regex(JOB_ID_PATTERN, 'expected "last" or the id of a job')])
    .optional(),
  encoder: z.enum(['static', 'all-minilm-l6-v2']).default('static'),
  name: dataName.optional(),
  rows: z.int().min(1).max(10_000_000).optional(),
  /** A first set in minutes: less text, and a shorter search. */
  quick: z.boolean().optional(),
  seed: z.int().min(0).optional(),
  publish: z
    .strictObject({ ...publishTo, admin_key: adminKey })
    .refine(isActivated, ONLY_ACTIVATED)
    .optional(),
});
export type CreateJob = z.infer<typeof createJobSchema>;

/** A job in the edge's API: the edge itself publishes, so there is no `publish`. */
export const createEdgeJobSchema = createJobSchema.omit({ publish: true });
export type CreateEdgeJob = z.infer<typeof createEdgeJobSchema>;

export const storeJobSchema = z.strictObject({
  /** The tenant that will own the set. */
  tenant: publishing.tenant,
});

const jobRequestSchema = createEdgeJobSchema.extend({ publish: z.strictObject(publishTo).optional() });
export type JobRequest = z.infer<typeof jobRequestSchema>;

const JOB_STATES = ['waiting', 'running', 'succeeded', 'failed', 'cancelled'] as const;

export const jobSchema = z.object({
  id: z.string(),
  object: z.literal('maskroute.job'),
  /** Counts the jobs of a home: their dates give no order where the clock was wrong. 0 on disk: an older backend wrote it. */
  number: z.int().default(0),
  status: z.enum(JOB_STATES),
  request: jobRequestSchema,
  /** Id of the schedule that created it; null: a request. */
  schedule: z.string().nullable().default(null),
  created_at: timestamp,
  started_at: timestamp.nullable(),
  finished_at: timestamp.nullable(),
  /** How often it was started. After a restart of the backend a job resumes. */
  starts: z.int(),
  progress: z
    .object({
      stage: z.string(),
      done: z.number(),
      total: z.number(),
      /** Estimated remaining time, at the speed so far. */
      left_s: z.number().nullable(),
      detail: z.string(),
    })
    .nullable(),
  /** Why it failed; for a job that was cancelled while it published, that it may have published all the same. */
  error: z.string().nullable(),
  result: z
    .object({
      version: z.string(),
      /** Output of publishing; null when it was not requested. */
      published: z.string().nullable(),
    })
    .nullable(),
});
export type Job = z.infer<typeof jobSchema>;
export type JobProgress = NonNullable<Job['progress']>;

export const isFinished = ({ status }: Pick<Job, 'status'>): boolean =>
  status === 'succeeded' || status === 'failed' || status === 'cancelled';

/* Schedules: the same job repeatedly, on its data at that time. */

const EVERY_s = { m: 60, h: 3600, d: 86_400 } as const;
const EVERY_PATTERN = /^(\d{1,6})([mhd])$/;
const EVERY_MAX_s = 366 * EVERY_s.d;

/** `30m`, `24h`, `7d` in seconds; NaN for other text. */
export function secondsOf(every: string): number {
  const [, count, unit] = EVERY_PATTERN.exec(every) ?? [];
  return Number(count) * EVERY_s[unit as keyof typeof EVERY_s];
}

const everySchema = z
  .string()
  .refine((every) => secondsOf(every) >= 60 && secondsOf(every) <= EVERY_MAX_s, {
    message: 'expected minutes, hours or days, at most a year: 30m, 24h, 7d',
  })
  .meta({ pattern: EVERY_PATTERN.source });

export const createScheduleSchema = z.strictObject({
  every: everySchema,
  /** When the first job begins; absent: one interval from now. */
  first_at: timestamp.optional(),
  job: createJobSchema,
});
export type CreateSchedule = z.infer<typeof createScheduleSchema>;

/** A schedule in the edge's API: its jobs publish to this edge. */
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
  /**
   * When the next job begins. Times missed while the backend was down, or while a job ran, are made up for by one job.
   */
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
