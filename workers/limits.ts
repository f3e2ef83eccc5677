/** Bounds of the edge, each with its reason. Times are milliseconds. */

/**
 * Configuration of live publications. A new version is seen within 5 s of its activation. While requests come in it
 * is refreshed behind them every 2 s; the first request after a pause asks D1 and waits up to 1 s for the answer: a new
 * version is two questions to a D1 that may be far away. After a request has waited in vain, none waits until D1 answers
 * again: the last good version is served meanwhile. All this is said of tenants whose pointers are held: the 1,000 that
 * were used last, or fewer where their sets are large ({@link LIVE_SETS_BYTES_MAX}).
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
  negativeEntriesMax: 0,
  loadsMax: 64,
} as const;

/** The running experiments are one entry: they too start and stop within 5 s. */
export const EXPERIMENTS = { ...TABLE, entriesMax: 1, loadsMax: 1 } as const;

/** More at a time would make every request walk a long list. */
export const EXPERIMENTS_RUNNING_MAX = 100;

/** A tenant's own: one tenant must not take the places of all. */
export const TENANT_EXPERIMENTS_RUNNING_MAX = 10;

/**
 * Distinct mask sets in started experiments, of all and of one tenant: every isolate holds all of them, at up to 0.5 MB,
 * and reads them one after the other when it begins. All of them fit into {@link DECODED_SETS_BYTES_MAX}, so that
 * reading that is cut short goes on where it was.
 */
export const EXPERIMENT_SETS_MAX = 64;
export const TENANT_EXPERIMENT_SETS_MAX = 10;

/**
 * Keys and what their tenants may do. A change (a revocation, say) holds within 5 s in an isolate that can reach
 * D1: nothing older is answered without asking again and waiting 1 s, which is what D1 takes on a slow day. While D1
 * is down, which the first request to wait in vain finds out, keys seen before work for an hour, and at most one
 * request a second waits 250 ms to find out whether it is back; a key that was seen revoked stays revoked. A wrong key is
 * remembered for 2 s so that a client in a loop asks D1 rarely.
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
  negativeEntriesMax: 1_000,
  loadsMax: 64,
} as const;

/** How often a stream asks whether its key still works: with what a look-up may be old, it ends within some 7 s. */
export const KEY_WATCH_ms = 2_000;

/** What is kept of a prompt and of an answer, where a tenant has them kept: UTF-16 units. */
export const TEXT_CHARS_MAX = 64 * 1024;

/** For how long ratings are kept with their comments, and what administrators changed. */
export const FEEDBACK_KEPT_ms = 90 * 86_400_000;
export const AUDIT_KEPT_DAYS = 365;

/** The backend's model list: it changes when a backend is restarted. */
export const MODELS = {
  fresh_ms: 5_000,
  revalidate_ms: Number.POSITIVE_INFINITY,
  stale_ms: 300_000,
  negative_ms: 0,
  wait_ms: 1_000,
  staleWait_ms: 0,
  load_ms: 3_000,
  retry_ms: 1_000,
  entriesMax: 1,
  negativeEntriesMax: 0,
  loadsMax: 1,
} as const;

/** The registry of backends: a change holds within seconds, and while D1 is down the last list does. */
export const BACKENDS = { ...MODELS, fresh_ms: 2_000, stale_ms: Number.POSITIVE_INFINITY } as const;

/** Questions to backends about their load, behind requests: one request asks a few, an answer is small. */
export const LOAD_PROBE = { timeout_ms: 2_000, aRequestMax: 4, bytesMax: 256 * 1024 } as const;

/** What an admin request, feedback or a backend's question for a mask waits for D1. */
export const D1_TIMEOUT_ms = 5_000;

/**
 * Decoded mask sets that an isolate of 128 MB keeps beyond those that are live or in experiments: 80 of the largest (at
 * 256 clusters of 384 dimensions each takes 0.5 MB), or a thousand of a usual size.
 */
export const DECODED_SETS_BYTES_MAX = 40 * 1024 * 1024;

/**
 * The decoded sets of all tenants' live publications in an isolate, a set that several tenants share counted once: 48 of
 * the largest, or 600 of a usual size; most of them are among the decoded ones above, too. When
 * others' sets need the room, the tenants that were used longest ago are let go, and their next request reads them again.
 * So nobody is let go while D1 does not answer; a tenant that was let go before runs dense until D1 answers.
 */
export const LIVE_SETS_BYTES_MAX = 24 * 1024 * 1024;

/** Masks that clients named and that were found: a name and a number each. */
export const NAMED_MASKS_MAX = 1_000;

/** Vectors of texts seen before, where embedding goes over a network: at 384 dimensions each takes 1.5 kB. */
export const VECTORS_MAX = 4_000;

/** Loading the static table is reading a local asset; it is done once an isolate. */
export const ENCODER_LOAD_TIMEOUT_ms = 5_000;

/** -1 routes everything: similarity is a cosine. */
export const ROUTE_SIMILARITY_MIN = -1;

/** A row of D1 holds 2 MB, the other columns and the statement included. */
export const MASK_SET_BYTES_MAX = 1_900_000;

/** What a tenant's own administrators may store: D1 holds 10 GB, and all tenants are in it. */
export const TENANT_ROOM = { keys: 10_000, experiments: 1_000, maskSets_bytes: 100_000_000 } as const;

/** A key that expired says for this long when it did; after that it is gone, and takes no room. */
export const EXPIRED_KEYS_KEPT_ms = 30 * 86_400_000;

/** Deeper JSON than this is refused: parsers and serializers recurse. */
export const JSON_DEPTH_MAX = 64;

/**
 * A body that is larger than this, or does not say how large it is, has so long to arrive: an isolate holds what came of
 * it meanwhile. Smaller ones are hardly anything, and a timer for each costs more. A refused body of any size has as long:
 * then its client gets the refusal, whether it has sent all or not.
 */
export const BODY_ARRIVAL = { untimedBytesMax: 64 * 1024, limit_ms: 30_000 } as const;

/** A refused body is read on up to this size, so that the client gets to read the refusal. */
export const DRAIN_BYTES_MAX = 32 * 1024 * 1024;

/** An error body of a backend is read whole before it is passed on. */
export const BACKEND_ERROR_BYTES_MAX = 64 * 1024;

/** A browser asks again after this what a page may send; Chromium keeps no answer for longer. */
export const PREFLIGHT_KEPT_s = 7_200;

/** How long clients are asked to wait when the backend or the configuration can't be reached. */
export const RETRY_AFTER_s = 1;

/** A budget of a minute has room again after 61 s; a client that waits for longer seems to hang. */
export const RETRIED_AFTER_MAX_s = 120;

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
 * A routing table that nobody could read again for longer makes the edge not ready: for so long keys that were seen
 * before work without the database, and then no request gets in.
 */
export const READY_TABLE_AGE_MAX_ms = KEYS.stale_ms;

/** A sample of where requests lie: one a tenant and isolate every few seconds says enough, and costs D1 little. */
export const TRAFFIC = { every_ms: 5_000, write_ms: 5_000, tenantsMax: 1_000 } as const;

/** A working day: a session of the dashboard can't be renewed, only opened again. */
export const SESSION_LIFETIME_s = 8 * 3600;
/** How long somebody may take at an OpenID Connect provider. */
export const SIGN_IN_s = 600;

/**
 * Which sessions ended before their time, and whose tenant is disabled. Both hold within 5 s everywhere, also while D1 does
 * not answer: nothing older is believed, and a session that cannot be looked up gets no further. What it asks for needs D1
 * anyway.
 */
export const SESSION_ENDS = { ...KEYS, stale_ms: KEYS.revalidate_ms } as const;
/** Ends that an isolate made, or heard of from a revocation: it needs no D1 to know them. */
export const SESSION_ENDS_KNOWN_MAX = 10_000;

/** The backends' encoder: the time is for loading it too, since embedding has the shorter `EMBED_TIMEOUT_MS`. */
export const EMBEDDINGS = { timeout_ms: 3_000, batch: 64, bytesMax: 4 * 1024 * 1024 } as const;

/** Questions about a backend's jobs. A mask set is the longest answer; an upload takes as long as it takes. */
export const JOBS = { timeout_ms: 15_000, bytesMax: 4 * 1024 * 1024 } as const;

/** A tenant's budget object: it answers in milliseconds, or it is out of reach and the request is refused. */
export const BUDGET = { wait_ms: 2_000, tries: 2 } as const;

/**
 * The rate-limit bindings of wrangler.toml. Their windows are ten seconds. They are asked once for some requests of a
 * caller in an isolate, since on one machine they are a question to another object, which no request should wait for.
 * A new isolate lets up to so many in before it asks.
 */
export const BURST = {
  window_s: 10,
  tenantAskedEvery: 250,
  adminAskedEvery: 10,
  callersMax: 10_000,
} as const;

/**
 * How long after a client left its backend is asked what the answer cost; it may have to notice first. With each
 * question's own time, its wait for a turn and what settling takes, this is less than the 30 s that the platform leaves to
 * a request whose client is gone.
 */
export const COST_QUESTION_DELAYS_ms = [50, 250, 1_000, 3_000, 8_000] as const;
/**
 * Questions of one isolate at a time. A question that finds no room waits a little, then it is left out; the account has
 * some more. A tenant that asks none yet has room of its own, so that nobody's flood of hang-ups costs others their
 * answers' true price.
 */
export const COST_QUESTIONS_MAX = { all: 16, whileOwn: 4 } as const;
export const COST_QUESTION_ms = 2_000;
/** How long a question waits for its turn, and how often it looks. */
export const COST_QUESTION_WAIT_ms = 1_000;
export const COST_QUESTION_LOOK_ms = 50;
/**
 * Events of requests that end within 100 ms of each other go to the queue together (it takes 100 messages of
 * 256 kB in all). Whoever has not heard of its batch for 2 s sends its own event.
 */
export const EVENT_BATCH = { wait_ms: 100, eventsMax: 100, lost_ms: 2_000 } as const;

/** An event that the queue does not take is offered again; after that the log has it. */
export const EVENT_RETRY_DELAYS_ms = [0, 100, 1_000] as const;

/**
 * Spans of requests that end within 200 ms of each other go to the collector together. What it does not take in time is
 * lost, and so is what comes while it takes nothing: a request has some five spans, of some 0.5 kB each.
 */
export const TRACES = { wait_ms: 200, lost_ms: 2_000, post_ms: 5_000, postsMax: 4, spansMax: 4_096 } as const;

/**
 * Counting events. An id is kept for longer than an event may take to arrive (a queue keeps messages for four
 * days), so that none is counted twice; minutes are kept for pictures over a month.
 */
export const EVENTS = {
  kept_ms: 7 * 86_400_000,
  counted_ms: 6 * 86_400_000,
  minutesKept_ms: 35 * 86_400_000,
  count_ms: 20_000,
  retryDelay_s: 30,
} as const;

/**
 * What a version is judged by that may be taken back: its last quarter of an hour, so that one which turns bad after
 * weeks is found in minutes; where that has too few requests, its last two hours, and where these do, its last day.
 */
export const JUDGED_ms = [15 * 60_000, 2 * 3_600_000, 86_400_000] as const;

/**
 * Of a version with more rows of outcomes in that time the newest are read, at some 0.4 µs each: D1 does nothing else
 * meanwhile. A row is a minute's requests that have all else in common, at least one.
 */
export const JUDGED_ROWS_MAX = 100_000;

/** Comparing with dense: one at a time an isolate, short, and done before the platform ends what is left behind. */
export const COMPARISON_SHARE = 0.01;
export const COMPARISON = { atOnceMax: 1, tokens: 16, timeout_ms: 12_000 } as const;
