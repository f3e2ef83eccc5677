/** The backends of one isolate, wired: registry, what was learned of each, signed tokens, and the pool over them. */
import { type BackendEntry, loadReportSchema } from '../../shared/wire/backend-load.ts';
import { readBounded } from '../../shared/wire/read-bounded.ts';
import { createSigner } from '../../shared/wire/service-token.ts';
import { log, reasonOf } from '../base/log.ts';
import type { Hold } from '../base/waiting.ts';
import { type BackendRow, listBackends } from '../db/backend-rows.ts';
import { type Database, isoTimeOrNull } from '../db/d1.ts';
import type { Config } from '../env.ts';
import { LOAD_PROBE } from '../limits.ts';
import { attempt, type BackendRequest } from './attempt.ts';
import { type LiveBackend, type Observed, observe } from './backend-state.ts';
import { type Backends, createBackends } from './pool.ts';
import { createRegistry } from './registry.ts';

/* How requests reach backends: over the open network, or over a private one that is bound to the worker. */

/** As `fetch`, for absolute addresses. */
export type Send = (url: string, init: RequestInit) => Promise<Response>;

/** `network` is a binding of Workers VPC; without one backends have public names. */
export const sender = (network: Pick<Fetcher, 'fetch'> | undefined): Send =>
  network === undefined ? (url, init) => fetch(url, init) : (url, init) => network.fetch(url, init);

/** One backend's answer to a question; `status` null: it gave none, or something in between did. */
export type Said = { readonly status: number | null; readonly value: unknown };

export interface BackendPool extends Backends {
  /** Every enabled backend is asked the same; what they answer with success, as JSON. Rejects when none does. */
  askAll(path: string, timeout_ms: number, hold: Hold): Promise<unknown[]>;
  /** The same, with what those say that refuse. Rejects when nobody knows which backends there are. */
  askEach(path: string, timeout_ms: number, hold: Hold, only?: string): Promise<readonly Said[]>;
  /** With what this isolate knows of it. */
  describe(row: BackendRow): BackendEntry;
  /** After a change of the registry. */
  refresh(hold: Hold): Promise<void>;
}

export function createBackendPool(
  db: Database,
  config: Pick<Config, 'BACKEND_URL' | 'BACKEND_KEY' | 'BACKEND_HEDGE_MS' | 'EDGE_URL'>,
  send: Send,
): BackendPool {
  const registry = createRegistry(() => listBackends(db), config.BACKEND_URL);
  const known = new Map<string, { readonly url: string; readonly seen: Observed }>();

  /** A backend that moved to another address is another one. */
  const observedOf = ({ id, url }: Pick<LiveBackend, 'id' | 'url'>): Observed => {
    const found = known.get(id);
    if (found?.url === url) return found.seen;
    const seen = observe();
    known.set(id, { url, seen });
    return seen;
  };
  const list = async (hold: Hold): Promise<readonly BackendRow[]> => {
    const rows = registry.fresh() ?? (await registry.enabled(hold));
    for (const row of rows) observedOf(row);
    if (known.size > rows.length) dropUnlisted(known, rows);
    return rows;
  };

  const sign = createSigner(config.BACKEND_KEY);
  // The edge's own address is what its operator says. The host of a request is what its client says: a backend would be
  // led wherever that points.
  const { EDGE_URL: edge = '' } = config;
  const token = ({ tenant }: BackendRequest, { url }: LiveBackend): Promise<string> =>
    sign({ tenant, edge, audience: url });
  /** Its status and JSON, also of a refusal. @throws when it gives no answer of the protocol. */
  const askOne = async (
    backend: LiveBackend,
    path: string,
    timeout_ms: number,
  ): Promise<{ status: number; value: unknown }> => {
    const { signal } = new AbortController();
    const requestId = `edge_${crypto.randomUUID()}`;
    const request = { path, requestId, tenant: '', signal, timeout_ms } satisfies BackendRequest;
    const outcome = await attempt({
      send,
      url: backend.url,
      token: await token(request, backend),
      request,
      signal,
      timeout_ms,
      left_ms: timeout_ms,
    });
    if (outcome.kind === 'failed') throw outcome.error;
    if (outcome.kind === 'late') throw new Error(`no answer within ${outcome.waited_ms} ms`);
    if (outcome.kind === 'cancelled') throw new Error('it was called off');
    const { status, body } = outcome.response;
    return { status, value: JSON.parse(await readBounded(body, LOAD_PROBE.bytesMax)) };
  };
  const successOf = async (backend: LiveBackend, path: string, timeout_ms: number): Promise<unknown> => {
    const { status, value } = await askOne(backend, path, timeout_ms);
    if (status < 200 || status >= 300) throw new Error(`the backend ${backend.id} answered ${status}`);
    return value;
  };

  /** Whether it told its load. */
  const probe = async (backend: LiveBackend): Promise<boolean> => {
    try {
      const report = loadReportSchema.parse(await successOf(backend, '/v1/load', LOAD_PROBE.timeout_ms));
      observedOf(backend).probed(report, Date.now());
      return true;
    } catch (error) {
      log('warn', 'backend_load_unknown', { backend: backend.id, reason: reasonOf(error) });
      return false;
    }
  };
  const suspect = async (backend: LiveBackend): Promise<void> => {
    if (!(await probe(backend))) observedOf(backend).breaker.failed(Date.now(), true);
  };
  const refreshLoads = (backends: readonly LiveBackend[], hold: Hold): void => {
    const now_ms = Date.now();
    let asked = 0;
    for (const backend of backends) {
      const seen = observedOf(backend);
      // With one backend there is nothing to choose, so nothing to ask unless it seems to be gone.
      if (backends.length < 2 && seen.breaker.state(now_ms) === 'closed') continue;
      if (asked < LOAD_PROBE.aRequestMax && seen.takeProbe(now_ms)) {
        asked++;
        hold(probe(backend));
      }
    }
  };

  const pool = createBackends({
    send,
    list,
    observed: (id) => known.get(id)!.seen,
    token,
    refresh: refreshLoads,
    suspect,
    hedge_ms: config.BACKEND_HEDGE_MS,
  });
  return {
    ...pool,
    async askEach(path, timeout_ms, hold, only) {
      const backends = (await list(hold)).filter(({ id }) => only === undefined || id === only);
      return await Promise.all(
        backends.map((backend) =>
          askOne(backend, path, timeout_ms).catch(() => ({ status: null, value: null })),
        ),
      );
    },
    async askAll(path, timeout_ms, hold) {
      const backends = await list(hold);
      const answers = await Promise.allSettled(
        backends.map(async (backend) => {
          const answer = await successOf(backend, path, timeout_ms);
          const models = modelIds(answer);
          if (models !== undefined) observedOf(backend).models = models;
          return answer;
        }),
      );
      const given = answers.filter((answer) => answer.status === 'fulfilled').map(({ value }) => value);
      if (given.length > 0) return given;
      throw (
        answers.find((answer) => answer.status === 'rejected')?.reason ?? new Error('no backend is enabled')
      );
    },
    describe: ({ createdAt_ms, updatedAt_ms, ...row }) => ({
      ...row,
      regions: [...row.regions],
      created_at: isoTimeOrNull(createdAt_ms),
      updated_at: isoTimeOrNull(updatedAt_ms),
      state: (known.get(row.id)?.seen ?? observe()).summary(Date.now()),
    }),
    refresh: (hold) => registry.refresh(hold),
  };
}

function dropUnlisted(known: Map<string, unknown>, rows: readonly BackendRow[]): void {
  const listed = new Set(rows.map(({ id }) => id));
  for (const id of known.keys()) if (!listed.has(id)) known.delete(id);
}

/** The ids of a model list; undefined when it is none. */
function modelIds(answer: unknown): ReadonlySet<string> | undefined {
  const data = (answer as { data?: unknown } | null)?.data;
  if (!Array.isArray(data)) return undefined;
  return new Set(data.map((entry) => String((entry as { id?: unknown } | null)?.id)));
}
