/** Bounds of the edge, each with its reason. Times are milliseconds. */

/**
 * The cache of live publications. A new version is seen within 5 s of its activation. While requests come in, it is
 * refreshed in the background every 2 s; the first request after a pause asks D1 and waits up to 1 s: a new version
 * takes two queries to a D1 that may be far away. After a request has timed out, none waits until D1 answers again, and
 * the last good version is served. This holds for cached tenants: the 1,000 most recently used, or fewer if their sets
 * are large ({@link LIVE_SETS_BYTES_MAX}).
 */
export const TABLE = {
  fresh_ms: 2_000,
  revalidate_ms: 4_000,
  stale_ms: Number.POSITIVE_INFINITY,
  negative_ms: 0,
  wait_ms: 1_000,
  staleWait_ms: 1_000,
  failingWait_ms: 250,
  load_ms: 3_000,
  retry_ms: 1_000,
  retriesBehind: true,
  entriesMax: 1_000,
} as const;

/** The running experiments are one cache entry; they also start and stop within 5 s. */
export const EXPERIMENTS = { ...TABLE, entriesMax: 1 } as const;

/** Most running experiments: every request checks all of them. */
export const EXPERIMENTS_RUNNING_MAX = 100;

/** Most running experiments of one tenant, so that it cannot use up the limit of all. */
export const TENANT_EXPERIMENTS_RUNNING_MAX = 10;

/**
 * Most distinct mask sets in started experiments, overall and of one tenant: every isolate keeps all of them, at up to
 * 0.5 MB each, and reads them one after the other when it starts. They fit into {@link DECODED_SETS_BYTES_MAX}, so that
 * interrupted reading continues where it stopped.
 */
export const EXPERIMENT_SETS_MAX = 64;
export const TENANT_EXPERIMENT_SETS_MAX = 10;

/**
 * The cache of keys and their tenants' limits. A change (such as a revocation) takes effect within 5 s in an isolate
 * that can reach D1: older entries are used only after asking D1 again and waiting up to 1 s, as long as a slow D1
 * takes. While D1 is down, known keys work for an hour, and at most one request a second waits 250 ms to see whether D1
 * is back; a revoked key stays revoked. A wrong key is cached for 2 s, so that a client in a loop rarely causes a
 * query.
 */
export const KEYS = {
  fresh_ms: 2_000,
  revalidate_ms: 5_000,
  stale_ms: 3_600_000,
  negative_ms: 2_000,
  wait_ms: 2_000,
  staleWait_ms: 1_000,
  failingWait_ms: 250,
  load_ms: 3_000,
  retry_ms: 1_000,
  entriesMax: 10_000,
} as const;

/**
 * How often a stream checks whether its key still works. With the cache's age, a stream ends within about 7 s of a
 * revocation.
 */
export const KEY_WATCH_ms = 2_000;

/** Longest kept prompt and answer, for tenants that keep texts; in UTF-16 units. */
export const TEXT_CHARS_MAX = 64 * 1024;

/** Tries to store them while D1 fails or does not answer: 24 s in all, of the 30 s that the platform allows after an answer. */
export const TEXTS = { delays_ms: [0, 1_000, 8_000], insert_ms: 5_000 } as const;

/** How long ratings with their comments are kept, and the audit log. */
export const FEEDBACK_KEPT_ms = 90 * 86_400_000;
export const AUDIT_KEPT_DAYS = 365;

/** The cache of backends' model lists, which change when a backend restarts; while none answers the last list is used. */
export const MODELS = {
  fresh_ms: 5_000,
  revalidate_ms: Number.POSITIVE_INFINITY,
  stale_ms: Number.POSITIVE_INFINITY,
  negative_ms: 0,
  wait_ms: 1_000,
  staleWait_ms: 0,
  load_ms: 3_000,
  retry_ms: 1_000,
  entriesMax: 1,
} as const;

/**
 * How long a backend's model list is waited for. With the wait for the registry it is shorter than `MODELS.load_ms`, so that a
 * silent backend does not hide the models of the others.
 */
export const MODEL_LIST_ms = 1_500;

/**
 * The cache of the registry of backends: a change takes effect within seconds; while D1 is down the last list is used.
 */
export const BACKENDS = { ...MODELS, fresh_ms: 2_000 } as const;

/** Load probes of backends, in the background: one request sends a few, and answers are small. */
export const LOAD_PROBE = { timeout_ms: 2_000, aRequestMax: 4, bytesMax: 256 * 1024 } as const;

/** How long an admin request, feedback or a backend's request for a mask waits for D1. */
export const D1_TIMEOUT_ms = 5_000;

/**
 * Decoded mask sets that an isolate of 128 MB keeps beyond those that are live or in experiments: 80 of the largest (at
 * 256 clusters of 384 dimensions each takes 0.5 MB), or a thousand of a usual size.
 */
export const DECODED_SETS_BYTES_MAX = 40 * 1024 * 1024;

/**
 * The decoded sets of all tenants' live publications in an isolate, a set that several tenants share counted once: 48
 * of the largest, or 600 of a usual size; most of them are among the decoded ones above, too. When other sets need the
 * room, the least recently used tenants are evicted, and their next request reads them again. So no tenant is evicted
 * while D1 does not answer; a tenant that was evicted before runs dense until D1 answers.
 */
export const LIVE_SETS_BYTES_MAX = 24 * 1024 * 1024;

/** Cached sparsities of masks that clients named: a name and a number each. */
export const NAMED_MASKS_MAX = 1_000;

/** Cached vectors of texts, for encoders behind a network: at 384 dimensions each takes 1.5 kB. */
export const VECTORS_MAX = 4_000;

/**
 * An encoder that the edge's configuration names is loaded once an isolate; the static one is a local asset. A request
 * waits up to 5 s, and a load goes on for later requests.
 */
export const ENCODER_LOAD = {
  ...MODELS,
  fresh_ms: Number.POSITIVE_INFINITY,
  wait_ms: 5_000,
  load_ms: 10_000,
  retry_ms: 0,
} as const;

/** The encoder of the backends, which may restart with another one, is asked for again and again, behind requests. */
export const BACKEND_ENCODER_LOAD = {
  ...ENCODER_LOAD,
  fresh_ms: MODELS.fresh_ms,
  retry_ms: MODELS.retry_ms,
} as const;

/** -1 routes everything: similarity is a cosine. */
export const ROUTE_SIMILARITY_MIN = -1;

/** A row of D1 holds 2 MB, the other columns and the statement included. */
export const MASK_SET_BYTES_MAX = 1_900_000;

/** How much a tenant's own administrators may store: D1 holds 10 GB for all tenants. */
export const TENANT_ROOM = { keys: 10_000, experiments: 1_000, maskSets_bytes: 100_000_000 } as const;

/** Expired keys are listed for this long and then deleted. */
export const EXPIRED_KEYS_KEPT_ms = 30 * 86_400_000;

/** Deeper JSON than this is refused: parsers and serializers recurse. */
export const JSON_DEPTH_MAX = 64;

/**
 * Most fields of a body, of all its objects together; and most objects and lists. The isolate serves nobody else while it
 * parses and checks a body: 250,000 fields with names of their own take it up to a second, and 1.4 million empty objects,
 * which fit into 4 MB, a third of one and 89 MB of its memory. The longest chats have half of this.
 */
export const JSON_FIELDS_MAX = 50_000;

/**
 * A larger body, or a body without a declared length, must arrive within this time, since the isolate buffers it.
 * Smaller bodies take little memory, less than a timer is worth. A refused body of any size is drained for as long;
 * then its client gets the error, whether it has sent everything or not.
 */
export const BODY_ARRIVAL = { untimedBytesMax: 64 * 1024, limit_ms: 30_000 } as const;

/** A refused body is drained up to this size, so that the client can read the error. */
export const DRAIN_BYTES_MAX = 32 * 1024 * 1024;

/** An error body of a backend is read whole before it is passed on. */
export const BACKEND_ERROR_BYTES_MAX = 64 * 1024;

/** How long browsers may cache a CORS preflight; Chromium caches none for longer. */
export const PREFLIGHT_KEPT_s = 7_200;

/** `retry-after` when a backend or the configuration can't be reached. */
export const RETRY_AFTER_s = 1;

/**
 * Longest `retry-after` for which clients may retry. OpenAI's clients sleep for 60 s at most, Vercel's AI SDK for less;
 * when told to wait longer they come back at once, and give up.
 */
export const RETRIED_AFTER_MAX_s = 59;

/** Readiness asks the backend; answers are shared for this long. */
export const READINESS = {
  ...MODELS,
  fresh_ms: 1_000,
  revalidate_ms: 1_000,
  stale_ms: 0,
  staleWait_ms: MODELS.wait_ms,
  retry_ms: 0,
} as const;

/**
 * The edge is not ready when its routing table is older: known keys work for this long without the database, and then
 * no request is accepted.
 */
export const READY_TABLE_AGE_MAX_ms = KEYS.stale_ms;

/**
 * Samples of requests' positions: one for each tenant and isolate every few seconds is enough, and is little work for
 * D1.
 */
export const TRAFFIC = { every_ms: 5_000, write_ms: 5_000, tenantsMax: 1_000 } as const;

/** A working day: a dashboard session can't be renewed; people log in again. */
export const SESSION_LIFETIME_s = 8 * 3600;
/** How long somebody may take at an OpenID Connect provider. */
export const SIGN_IN_s = 600;

/**
 * The cache of ended sessions and disabled tenants. Both take effect everywhere within 5 s, also while D1 does not
 * answer: older entries are not used, and a session that cannot be checked is refused. Its requests need D1 anyway.
 */
export const SESSION_ENDS = { ...KEYS, stale_ms: KEYS.revalidate_ms } as const;
/** Ends of sessions that this isolate itself recorded; it needs no D1 to know them. */
export const SESSION_ENDS_KNOWN_MAX = 10_000;

/** The backends' encoder: the timeout includes loading it; embedding alone has the shorter `EMBED_TIMEOUT_MS`. */
export const EMBEDDINGS = { timeout_ms: 3_000, bytesMax: 4 * 1024 * 1024 } as const;

/** Requests to a backend's jobs. A mask set is the longest answer; an upload has no time limit, its answer has. */
export const JOBS = { timeout_ms: 15_000, bytesMax: 4 * 1024 * 1024 } as const;

/** A tenant's budget object: it answers in milliseconds, or it is out of reach and the request is refused. */
export const BUDGET = { wait_ms: 2_000, tries: 2 } as const;

/**
 * The rate-limit bindings of wrangler.toml. Their windows are ten seconds. An isolate calls them once for several
 * requests of a caller, since on one machine each call is a request to another object. A new isolate admits up to that
 * many requests before it asks.
 */
export const BURST = {
  window_s: 10,
  tenantAskedEvery: 250,
  adminAskedEvery: 10,
  callersMax: 10_000,
} as const;

/**
 * Delays, after a client hung up, at which its backend is asked for the answer's cost; it may have to notice the
 * hang-up first. With the time of each query, its wait for a turn and settling, this is less than the 30 s that the
 * platform allows a request whose client is gone.
 */
export const COST_QUESTION_DELAYS_ms = [50, 250, 1_000, 3_000, 6_000] as const;
/**
 * A backend that seems gone in so many of these queries in a row has ended, and its answers' costs with it. In a single one
 * a connection may have broken.
 */
export const COST_QUESTIONS_WHILE_GONE = 3;
/**
 * Most concurrent cost queries of one isolate. A query without a free place waits a little and is then skipped; the
 * account has more attempts. A tenant without running queries has reserved places, so that one tenant's flood of
 * hang-ups does not prevent exact charges for others.
 */
export const COST_QUESTIONS_MAX = { all: 16, whileOwn: 4 } as const;
export const COST_QUESTION_ms = 2_000;
/** How long a cost query waits for its turn, and how often it checks. */
export const COST_QUESTION_WAIT_ms = 1_000;
export const COST_QUESTION_LOOK_ms = 50;
/**
 * Events of requests that end within 100 ms of each other go to the queue together (it takes 100 messages of 256 kB in
 * all). A request whose batch is not sent within 2 s sends its own event.
 */
export const EVENT_BATCH = { wait_ms: 100, eventsMax: 100, lost_ms: 2_000 } as const;

/** Delays of retries when the queue refuses an event; after the last one it is logged. */
export const EVENT_RETRY_DELAYS_ms = [0, 100, 1_000] as const;

/**
 * Spans of requests that end within 200 ms of each other go to the collector together. Spans that it does not accept in
 * time are lost. A request has about five spans of 0.5 kB each.
 */
export const TRACES = { wait_ms: 200, lost_ms: 2_000, post_ms: 5_000, postsMax: 4, spansMax: 4_096 } as const;

/**
 * Counting of events. Ids are kept for longer than an event may take to arrive (a queue keeps messages for four days),
 * so that none counts twice; minutes are kept for charts over a month. Versions are judged before a delivery is
 * acknowledged, so a D1 that stalls may not hold it for ever. Expired rows are deleted every minute, for at most `forget_ms`.
 */
export const EVENTS = {
  kept_ms: 7 * 86_400_000,
  counted_ms: 6 * 86_400_000,
  minutesKept_ms: 35 * 86_400_000,
  count_ms: 20_000,
  judge_ms: 20_000,
  forget_ms: 50_000,
  retryDelay_s: 30,
} as const;

/**
 * Periods by which a version is judged for automatic rollback: the last 15 minutes, so that a version that turns bad
 * after weeks is found in minutes; if these have too few requests, the last two hours; and then the last day.
 */
export const JUDGED_ms = [15 * 60_000, 2 * 3_600_000, 86_400_000] as const;

/**
 * If a version has more rows of outcomes in that period, only the newest are read, at about 0.4 µs each: D1 does
 * nothing else meanwhile. A row has at least one request: a minute's requests with equal keys.
 */
export const JUDGED_ROWS_MAX = 100_000;

/**
 * Comparisons with dense: one at a time in an isolate, short, and finished before the platform ends background work.
 */
export const COMPARISON_SHARE = 0.01;
export const COMPARISON = { atOnceMax: 1, tokens: 16, timeout_ms: 11_000 } as const;
