/**
 * The backends as one isolate knows them: the registry, the state of each, and requests to them. A completion goes to
 * one of them (call-backend.ts); other requests go to all.
 */
import { type BackendEntry, type LoadReport, loadReportSchema } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readAnswer } from '../../shared/wire/parse-body.ts';
import type { ModelEntry } from '../../shared/wire/protocol.ts';
import { createSigner } from '../../shared/wire/service-token.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { DeadlineError, type Hold, noHold, steadyNow_ms } from '../base/waiting.ts';
import { type BackendRow, listBackends } from '../db/backend-rows.ts';
import { type Database, isoTimeOrNull } from '../db/d1.ts';
import type { Config } from '../env.ts';
import { LOAD_PROBE } from '../limits.ts';
import { type Attempted, attempt, type BackendRequest, type Send } from './attempt.ts';
import { type KnownBackend, type LiveBackend, Observed } from './backend-state.ts';
import {
  type Call,
  type Called,
  type CallParts,
  callBackend,
  homeBackend,
  type Purpose,
} from './call-backend.ts';
import type { ServedModels } from './choose.ts';
import { createRegistry, type Given, type Registry } from './registry.ts';

/** One backend's answer; `status` null: it gave none, or a proxy answered in its place. `seemsGone`: as an attempt's. */
type Said = { readonly status: number | null; readonly value: unknown; readonly seemsGone: boolean };

type PoolConfig = Pick<Config, 'BACKEND_URL' | 'BACKEND_KEY' | 'BACKEND_HEDGE_MS' | 'EDGE_URL'>;

export class BackendPool {
  readonly #registry: Registry;
  readonly #known = new Map<string, { readonly url: string; readonly seen: Observed }>();
  readonly #callParts: CallParts;

  constructor(db: Database, config: PoolConfig, send: Send) {
    this.#registry = createRegistry(() => listBackends(db), config.BACKEND_URL);
    const sign = createSigner(config.BACKEND_KEY);
    // The edge's address comes from its operator (`EDGE_URL`). The host of a request comes from the client and must not
    // be passed to backends.
    const { EDGE_URL: edge = '' } = config;
    this.#callParts = {
      send,
      token: ({ tenant }, { url }) => sign({ tenant, edge, audience: url }),
      suspect: (backend) => this.#suspect(backend),
      hedge_ms: config.BACKEND_HEDGE_MS,
    };
  }

  /** As `callBackend`, which goes through the enabled backends. */
  async call(call: Call): Promise<Called> {
    const backends = await this.#list(call.hold);
    this.#refreshLoads(backends, call.hold);
    return await callBackend(this.#callParts, call, backends);
  }

  /** Whether any backend lists the model, or did when it last answered. */
  lists(model: string): boolean {
    return [...this.#known.values()].some(({ seen }) => seen.models?.has(model) === true);
  }

  /** As `homeBackend`, of the enabled backends. */
  async home(purpose: Purpose, tenant: string, hold: Hold): Promise<string | undefined> {
    return homeBackend(await this.#list(hold), purpose, tenant);
  }

  /* Questions to all. A cache asks them and keeps its request alive, so nothing else needs to. */

  /** The first successful answer of an enabled backend. Rejects when there is none. */
  async askAny(path: string, timeout_ms: number): Promise<unknown> {
    const backends = await this.#list(noHold);
    const answers = backends.map((backend) => this.#askForSuccess(backend, path, timeout_ms));
    return await Promise.any(answers).catch(({ errors }: AggregateError) => {
      throw errors[0] ?? noneEnabled();
    });
  }

  /** The answers to `GET /v1/models`, as `askAll`; remembers which backend serves which models. */
  modelLists(timeout_ms: number): Promise<Given[]> {
    return this.askAll('/v1/models', timeout_ms, ({ seen }, answer) => {
      const models = servedModels(answer);
      if (models !== undefined) seen.models = models;
    });
  }

  /**
   * Sends the same request to every enabled backend; returns the successful answers. Empty when no backend is enabled;
   * rejects when none of the enabled ones answers.
   */
  async askAll(
    path: string,
    timeout_ms: number,
    learn: (backend: KnownBackend, answer: unknown) => void = () => {},
  ): Promise<Given[]> {
    const backends = await this.#list(noHold);
    const answers = await Promise.allSettled(
      backends.map(async (backend) => {
        const answer = await this.#askForSuccess(backend, path, timeout_ms);
        learn(backend, answer);
        return { backend: backend.id, answer };
      }),
    );
    const given = answers.filter((answer) => answer.status === 'fulfilled').map(({ value }) => value);
    const refused = answers.find((answer) => answer.status === 'rejected');
    if (given.length === 0 && refused !== undefined) throw refused.reason;
    return given;
  }

  /** Sends the same request to each of these, in the registry or not. @returns what each says, refusals too. */
  async askEach(
    backends: readonly LiveBackend[],
    path: string,
    timeout_ms: number,
  ): Promise<readonly Said[]> {
    return await Promise.all(
      backends.map(async (backend) => {
        const outcome = await this.#attempt(backend, path, timeout_ms);
        const seemsGone = outcome.kind === 'failed' && outcome.seemsGone;
        const { status, value } = await read(outcome, backend, timeout_ms).catch(() => NOTHING_SAID);
        return { status, value, seemsGone };
      }),
    );
  }

  /** A registry entry, with this isolate's state of the backend. */
  describe({ createdAt_ms, updatedAt_ms, unreadable, ...row }: BackendRow): BackendEntry {
    return {
      ...row,
      regions: [...row.regions],
      created_at: isoTimeOrNull(createdAt_ms),
      updated_at: isoTimeOrNull(updatedAt_ms),
      state: (this.#known.get(row.id)?.seen ?? new Observed()).summary(steadyNow_ms()),
      ...(unreadable === null ? {} : { unreadable }),
    };
  }

  /** Reads the registry again, after a change. */
  refresh(hold: Hold): Promise<void> {
    return this.#registry.refresh(hold);
  }

  async #list(hold: Hold): Promise<readonly KnownBackend[]> {
    const rows = await this.#registry.enabled(hold);
    const backends = rows.map(({ id, url, regions, weight }) => {
      return { id, url, regions, weight, seen: this.#observed(id, url) };
    });
    if (this.#known.size > rows.length) {
      const listed = new Set(rows.map(({ id }) => id));
      for (const id of this.#known.keys()) if (!listed.has(id)) this.#known.delete(id);
    }
    return backends;
  }

  /** The state of a backend; a new address gets a new state. */
  #observed(id: string, url: string): Observed {
    const found = this.#known.get(id);
    if (found?.url === url) return found.seen;
    const seen = new Observed();
    this.#known.set(id, { url, seen });
    return seen;
  }

  async #attempt(backend: LiveBackend, path: string, timeout_ms: number): Promise<Attempted> {
    const { send, token: sign } = this.#callParts;
    const request: BackendRequest = { path, requestId: `edge_${crypto.randomUUID()}`, tenant: '' };
    const token = await sign(request, backend);
    // An attempt's time limit ends with the first byte; this signal bounds the whole answer.
    const signal = AbortSignal.timeout(timeout_ms);
    const time = { timeout_ms, left_ms: timeout_ms };
    return await attempt({ send, url: backend.url, token, request, signal, time });
  }

  async #askForSuccess(backend: LiveBackend, path: string, timeout_ms: number): Promise<unknown> {
    const outcome = await this.#attempt(backend, path, timeout_ms);
    const { status, value } = await read(outcome, backend, timeout_ms);
    if (status < 200 || status >= 300) throw new Error(`the backend ${backend.id} answered ${status}`);
    return value;
  }

  /** Refreshes old load reports, in the background. */
  #refreshLoads(backends: readonly KnownBackend[], hold: Hold): void {
    const now_ms = steadyNow_ms();
    let asked = 0;
    for (const backend of backends) {
      const { seen } = backend;
      // With one backend there is no choice, so its load is needed only if it seems to be down.
      if (backends.length < 2 && seen.breaker.state(now_ms) === 'closed') continue;
      if (asked < LOAD_PROBE.aRequestMax && seen.takeProbe(now_ms)) {
        asked++;
        hold(this.#probe(backend));
      }
    }
  }

  /** Asks a backend for its load; false if it did not answer. */
  async #probe(backend: KnownBackend): Promise<boolean> {
    try {
      const answer = await this.#askForSuccess(backend, '/v1/load', LOAD_PROBE.timeout_ms);
      const report: LoadReport = loadReportSchema.parse(answer);
      backend.seen.probed(report, steadyNow_ms());
      return true;
    } catch (error) {
      if (isSilence(error)) backend.seen.silent(steadyNow_ms());
      log('warn', 'backend_load_unknown', { backend: backend.id, reason: reasonOf(error) });
      return false;
    }
  }

  async #suspect(backend: KnownBackend): Promise<void> {
    if (!(await this.#probe(backend))) backend.seen.breaker.failed(steadyNow_ms(), true);
  }
}

export const noneEnabled = (): Error => new Error('no backend is enabled');

const NOTHING_SAID = { status: null, value: null } as const;

/** An answer's status and JSON, also of a refusal. @throws when it is no answer of the protocol. */
async function read(
  outcome: Attempted,
  { id }: LiveBackend,
  timeout_ms: number,
): Promise<{ readonly status: number; readonly value: unknown }> {
  if (outcome.kind === 'failed') throw outcome.error;
  if (outcome.kind === 'late' || outcome.kind === 'cancelled')
    throw new DeadlineError(`an answer of ${id}`, timeout_ms);
  const value: unknown = JSON.parse(await readAnswer(outcome.response, LOAD_PROBE.bytesMax));
  return { status: outcome.response.status, value };
}

/** Whether a backend, or a proxy that reaches it, gave no answer at all, not even a refusal. */
const isSilence = (error: unknown): boolean =>
  error instanceof DeadlineError || (error instanceof MaskrouteError && error.code === 'backend_unreachable');

/** The models of a list; undefined for anything else. Backends of other versions may list them in other forms. */
function servedModels(answer: unknown): ServedModels | undefined {
  const data = (answer as { data?: unknown } | null)?.data;
  if (!Array.isArray(data)) return undefined;
  return new Map(
    (data as (Partial<ModelEntry> | null)[]).map((entry) => [
      String(entry?.id),
      entry?.maskroute ?? undefined,
    ]),
  );
}
