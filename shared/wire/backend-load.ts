/**
 * The wire format of the registry of backends (`/admin/v1/backends`), and what a backend reports about itself: its load
 * (`GET /v1/load`, and a header of every answer) and its encoders (`GET /v1/encoders`).
 */
import { z } from 'zod';
import { slug, timestamp } from '../admin/admin-wire.ts';
import { encoderSpecSchema } from '../mask/mask-set.ts';
import { HEADERS } from './protocol.ts';

/** The region of a backend that serves everywhere. */
export const ANYWHERE = '*';
export const BACKENDS_MAX = 64;

const backendUrl = z
  .url({ protocol: /^https?$/, error: 'expected an http or https address', abort: true })
  .max(500)
  .refine((text) => {
    const { username, password, search, hash } = new URL(text);
    return `${username}${password}${search}${hash}` === '';
  }, 'expected an address without credentials, query and fragment')
  .transform((text) => text.replace(/\/+$/, ''));
/** A continent (`EU`), a country (`DE`), a data centre (`FRA`), or `*`. */
const region = z.string().regex(/^(\*|[A-Z0-9]{2,4})$/, 'expected a code such as EU, DE or FRA, or *');

const fields = {
  url: backendUrl,
  regions: z.array(region).min(1).max(64),
  /** Its share of conversations among the backends of its region, relative to their weights. */
  weight: z.number().min(0.01).max(100),
  enabled: z.boolean(),
};

/** What a stored backend must have to get requests. */
export const storedBackendSchema = z.object({
  url: fields.url,
  regions: fields.regions,
  weight: fields.weight,
});

/** Fields of a backend, where this version of the edge cannot read all: no regions, or weight 0, where it cannot. */
export const readableBackend = ({ regions, weight }: Record<'regions' | 'weight', unknown>) => ({
  regions: fields.regions.safeParse(regions).data ?? [],
  weight: fields.weight.safeParse(weight).data ?? 0,
});

export const createBackendSchema = z.strictObject({
  id: slug,
  url: fields.url,
  regions: fields.regions.default([ANYWHERE]),
  weight: fields.weight.default(1),
  enabled: fields.enabled.default(true),
});
export const updateBackendSchema = z
  .strictObject(fields)
  .partial()
  .refine((change) => Object.keys(change).length > 0, 'names nothing to change')
  .meta({ minProperties: 1 });

/** The state of a backend as one isolate of the edge sees it. */
const backendStateSchema = z.object({
  /**
   * Circuit breaker. `closed`: requests are sent; `open`: they are not; `half_open`: one at a time, to probe whether
   * the backend is back.
   */
  breaker: z.enum(['closed', 'open', 'half_open']),
  /** Requests of this isolate in progress at the backend. */
  in_flight: z.int(),
  running: z.int().nullable(),
  waiting: z.int().nullable(),
  reported_at: timestamp.nullable(),
});
export type BackendState = z.infer<typeof backendStateSchema>;

export const backendSchema = z.object({
  id: z.string(),
  url: z.string(),
  regions: z.array(z.string()),
  weight: z.number(),
  enabled: z.boolean(),
  /** Null for the entry that stands for `BACKEND_URL` while the registry is empty. */
  created_at: timestamp.nullable(),
  updated_at: timestamp.nullable(),
  state: backendStateSchema,
  /**
   * Why this version of the edge cannot read it, if it cannot: another version or a hand wrote it. Then it gets no requests,
   * and its fields have what could be read. It can be changed or removed.
   */
  unreadable: z.string().optional(),
});
export type BackendEntry = z.infer<typeof backendSchema>;

export const BACKEND_HEADERS = {
  /** `running=2;waiting=0;capacity=64`, on the backend's answers. */
  load: 'x-maskroute-load',
  /**
   * How long the caller waits for the first token of a stream, or for a whole answer, ms; a client may shorten it, and
   * the edge passes on the remaining time.
   */
  deadline: 'x-maskroute-deadline-ms',
  /** The id of the backend that answered, on the edge's answers. */
  backend: 'x-maskroute-backend',
  /** A {@link BackendAffinity}, on the edge's answers if there are several backends. */
  affinity: 'x-maskroute-backend-affinity',
} as const;

/** All headers of a completion, as far as they apply; those of its tenant's budgets are OpenAI's. */
export const COMPLETION_HEADERS: readonly string[] = [
  ...Object.values(HEADERS),
  BACKEND_HEADERS.backend,
  BACKEND_HEADERS.affinity,
  ...['requests', 'tokens'].flatMap((unit) =>
    ['limit', 'remaining', 'reset'].map((what) => `x-ratelimit-${what}-${unit}`),
  ),
];

/**
 * Which backend answered a conversation's request. `hit`: the conversation's own backend, which has its KV cache pages.
 * `overflow`: another backend, because its own was busy. `failover`: another backend, because its own is gone, draining
 * or failed.
 */
export type BackendAffinity = 'hit' | 'overflow' | 'failover';

/** The answer of a backend's `GET /v1/load`. */
export const loadReportSchema = z.looseObject({
  object: z.literal('maskroute.load'),
  model: z.string(),
  running: z.int().min(0),
  waiting: z.int().min(0),
  /** Places in the queue of waiting requests. */
  capacity: z.int().min(0),
  draining: z.boolean(),
});
export type LoadReport = z.infer<typeof loadReportSchema>;
export type Load = Pick<LoadReport, 'running' | 'waiting' | 'capacity'>;

export const formatLoad = ({ running, waiting, capacity }: Load): string =>
  `running=${running};waiting=${waiting};capacity=${capacity}`;

/** Undefined when the header is missing or malformed. */
export function parseLoad(header: string | null): Load | undefined {
  const match = /^running=(\d{1,6});waiting=(\d{1,6});capacity=(\d{1,6})$/.exec(header ?? '');
  if (match === null) return undefined;
  return { running: Number(match[1]), waiting: Number(match[2]), capacity: Number(match[3]) };
}

/** One entry of a backend's `GET /v1/encoders`. */
const encoderEntrySchema = z.looseObject({
  id: z.string().min(1).max(300),
  object: z.literal('maskroute.encoder'),
  encoder: encoderSpecSchema,
});
export type EncoderEntry = z.infer<typeof encoderEntrySchema>;
export const encoderListSchema = z.looseObject({
  object: z.literal('list'),
  data: z.array(encoderEntrySchema).max(16),
});

/** A backend's answer of `POST /v1/embeddings`, as far as the edge reads it: OpenAI's format, and which encoder it was. */
export const embeddingsSchema = z.looseObject({
  data: z.array(z.looseObject({ embedding: z.array(z.number()) })),
  /** Absent from backends of earlier versions. */
  maskroute: z.looseObject({ encoder: encoderSpecSchema }).optional(),
});
