/** Events into outcomes: counted once however often they come, in the right place, and acted upon. */
import { createExecutionContext, createMessageBatch, getQueueResult } from 'cloudflare:test';
import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { type ExperimentResults, experimentResultsSchema } from '../../../shared/admin/experiment-wire.ts';
import type { LivePublication, Publication } from '../../../shared/admin/publication-wire.ts';
import type { EdgeEvent, RequestEvent } from '../../../shared/admin/requests-wire.ts';
import {
  type Drift,
  driftSchema,
  releaseComparisonSchema,
  type Stats,
  statsSchema,
  TRAFFIC_SAMPLES_MAX,
} from '../../../shared/admin/stats-wire.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { forget } from '../../../workers/db/count-events.ts';
import { openDatabase } from '../../../workers/db/d1.ts';
import { judgedOfVersion } from '../../../workers/db/outcomes.ts';
import { insertTrafficSample } from '../../../workers/db/request-rows.ts';
import type { Env } from '../../../workers/env.ts';
import edge from '../../../workers/index.ts';
import { EVENTS } from '../../../workers/limits.ts';
import { MODEL } from '../../support/edge/constants.ts';
import { interceptedD1 } from '../../support/intercepted-d1.ts';
import {
  activate,
  admin,
  badD1,
  created,
  goLive,
  later,
  makeMaskSet,
  newKey,
  newTenant,
  upload,
} from '../support/edge.ts';

afterEach(() => {
  vi.useRealTimers();
});

const hex = (bytes: number) =>
  [...crypto.getRandomValues(new Uint8Array(bytes))].map((b) => b.toString(16).padStart(2, '0')).join('');

function event(change: Partial<RequestEvent> = {}): RequestEvent {
  const created_at_ms = change.created_at_ms ?? Date.now();
  return {
    kind: 'request',
    id: hex(10),
    tenant: 'someone',
    key_id: 'k_1',
    day: new Date(created_at_ms).toISOString().slice(0, 10),
    created_at_ms,
    endpoint: 'chat',
    model: MODEL.id,
    mask: 'dense',
    sparsity: 0,
    mask_set: null,
    version: null,
    cluster: null,
    similarity: null,
    experiment: 'none',
    experiment_owner: '',
    variant: 'live',
    region: 'local',
    backend: null,
    fallback: null,
    stream: true,
    status: 200,
    error_code: null,
    prompt_tokens: 10,
    completion_tokens: 5,
    counted: true,
    ttft_ms: 20,
    tpot_ms: 6,
    total_ms: 50,
    request_id: 'req_test',
    source: 'client',
    ...change,
  };
}

/** What the platform does with a batch of messages. */
async function deliver(events: readonly unknown[], bindings: Partial<Env> = {}) {
  const messages = events.map((body, i) => ({ id: `m${i}`, timestamp: new Date(), attempts: 1, body }));
  const batch = createMessageBatch('maskroute-events', messages);
  const context = createExecutionContext();
  await edge.queue!(batch as never, { ...env, ...bindings } as never, context as never);
  const result = await getQueueResult(batch as never, context as never);
  const retried = result.retryMessages.map(({ msgId }: { msgId: string }) => msgId);
  return { retriedAll: result.retryBatch.retry, retried, acked: result.explicitAcks };
}

const results = async (id: string, query = ''): Promise<ExperimentResults> =>
  experimentResultsSchema.parse(await (await admin('GET', `/experiments/${id}/results${query}`)).json());
const stats = async (query: string): Promise<Stats> =>
  statsSchema.parse(await (await admin('GET', `/stats?${query}`)).json());

/** A quantile is a bucket off at most. */
const within = (found: number, exact: number) =>
  expect(Math.abs(Math.log2(found / exact))).toBeLessThan(1 / 8);

let experiments = 0;
async function experiment(): Promise<string> {
  const id = `counted-${++experiments}`;
  const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' }));
  await created(admin('POST', '/experiments', { id, variants }));
  return id;
}

describe('an event', () => {
  it('that is delivered again, alone or among others, at once or not, counts once', async () => {
    const { tenant } = await newTenant();
    const id = await experiment();
    const of = (variant: string) => event({ tenant, experiment: id, variant });
    const events = [of('a'), of('a'), of('b')];
    expect(await deliver(events)).toMatchObject({ retriedAll: false, acked: ['m0', 'm1', 'm2'] });
    await deliver(events);
    await deliver([events[1], events[1], of('b')]);
    await Promise.all([deliver(events), deliver(events), deliver(events.slice(1))]);
    const { variants } = await results(id);
    expect(variants.map(({ figures }) => figures.requests)).toEqual([2, 2]);
    expect(variants[0]!.figures).toMatchObject({ ttft_ms: 20, tpot_ms: 6, completion_tokens: 10 });
    const usage = await admin('GET', `/usage?tenant=${tenant}`);
    const { data } = await usage.json<{ data: object[] }>();
    expect(data).toMatchObject([{ requests: 4, prompt_tokens: 40, completion_tokens: 20, errors: 0 }]);
    const counted = await stats(`tenant=${tenant}&step=minute`);
    expect(counted.routing.reduce((sum, { requests }) => sum + requests, 0)).toBe(4);
  });

  it('of masks that a client makes up one a request takes no more than some rows of usage for good', async () => {
    const { tenant } = await newTenant();
    const { set } = await goLive('counted-masks');
    const known = set.clusters[0]!.mask;
    const own = (count: number) =>
      Array.from({ length: count }, () => event({ tenant, mask: `m_${hex(12)}`, sparsity: 0.1 }));
    await deliver(own(250));
    await deliver([...own(250), event({ tenant, mask: known }), event({ tenant })]);
    await deliver(own(100));
    const { results: rows } = await env.DB.prepare('select mask, requests from usage where tenant_id = ?')
      .bind(tenant)
      .all<{ mask: string; requests: number }>();
    expect(rows).toHaveLength(250 + 3);
    const requestsOf = (mask: string) => rows.find((row) => row.mask === mask)?.requests;
    expect([requestsOf(known), requestsOf('dense'), requestsOf('custom')]).toEqual([1, 1, 350]);
  });

  it('counts once in the quantiles, too, and these are near the times that were measured', async () => {
    const { tenant } = await newTenant();
    const id = await experiment();
    const timed = (variant: string, ttft_ms: number | null, tpot_ms: number | null, region = 'EU/DE/FRA') =>
      event({ tenant, experiment: id, variant, ttft_ms, tpot_ms, region });
    // 1 to 200 ms to the first token; one in fifty tokens takes 50 ms.
    const events = Array.from({ length: 200 }, (_, i) => timed('a', i + 1, i % 50 === 0 ? 50 : 5));
    const others = [timed('b', 10, null), timed('b', null, null), timed('b', 1_000, null, 'NA/US/DFW')];
    await deliver([...events, ...others]);
    await deliver([...events.slice(50), ...others]);
    await Promise.all([deliver(events), deliver([events.slice(0, 120), others])]);
    const about = { request: events[0]!.id, tenant, created_at_ms: Date.now() };
    await deliver([{ kind: 'rating', ...about, key_id: 'k_1', rating: 1 }]);

    const figures = async (query = '') => (await results(id, query)).variants.map((row) => row.figures);
    const [a, b] = await figures();
    within(a!.ttft_quantiles_ms!.p50, 100);
    within(a!.ttft_quantiles_ms!.p95, 190);
    within(a!.ttft_quantiles_ms!.p99, 198);
    within(a!.tpot_quantiles_ms!.p95, 5);
    within(a!.tpot_quantiles_ms!.p99, 50);
    within(b!.ttft_quantiles_ms!.p50, 10);
    within(b!.ttft_quantiles_ms!.p99, 1_000);
    expect(b!.tpot_quantiles_ms).toBeNull();
    expect(await figures('?region=eu/de/')).toEqual(await figures('?region=EU/DE'));
    const [, american] = await figures('?region=NA');
    within(american!.ttft_quantiles_ms!.p50, 1_000);
    expect((await figures('?region=AS'))[0]!.ttft_quantiles_ms).toBeNull();

    const { versions } = await stats(`tenant=${tenant}`);
    expect(versions).toMatchObject([{ version: null, figures: { requests: 203 } }]);
    within(versions[0]!.figures.ttft_quantiles_ms!.p50, 100);
    const { results: rows } = await env.DB.prepare('SELECT sum(count) AS n FROM latencies WHERE tenant = ?')
      .bind(tenant)
      .all();
    expect(rows).toEqual([{ n: 202 + 200 }]);
  });

  it('is asked for again while D1 is down, and then counts once', async () => {
    const id = await experiment();
    const events = [event({ experiment: id, variant: 'a' })];
    const d1 = badD1();
    d1.be('failing');
    expect(await deliver(events, { DB: d1.DB })).toMatchObject({ retriedAll: true, acked: [] });
    d1.be('good');
    expect(await deliver(events, { DB: d1.DB })).toMatchObject({ retriedAll: false });
    expect((await results(id)).variants[0]!.figures.requests).toBe(1);
  });

  it('that is malformed or too old is put aside, and holds up nobody', async () => {
    const id = await experiment();
    const good = event({ experiment: id, variant: 'a' });
    const old = event({ experiment: id, variant: 'a', created_at_ms: Date.now() - 30 * 86_400_000 });
    const answer = await deliver([{ kind: 'request' }, null, { ...good, id: 'x' }, old, good]);
    expect(answer.acked).toHaveLength(5);
    expect((await results(id)).variants[0]!.figures.requests).toBe(1);
  });

  it('counts once in a message with others, which holds up none of them for one that is malformed', async () => {
    const id = await experiment();
    const of = (variant: string) => event({ experiment: id, variant });
    const [first, ...others] = Array.from({ length: 700 }, (_, i) => of(i % 2 === 0 ? 'a' : 'b'));
    const messages = [[first, { kind: 'request' }, null], others, others.slice(10, 20), first, []];
    expect(await deliver(messages)).toMatchObject({ retriedAll: false, retried: [] });
    expect((await deliver(messages)).acked).toHaveLength(messages.length);
    expect((await results(id)).variants.map(({ figures }) => figures.requests)).toEqual([350, 350]);
  });

  it('of a newer edge, with names and a field that this one does not know, counts', async () => {
    const { tenant } = await newTenant();
    const names = { fallback: 'mask_worn_out', endpoint: 'speech', source: 'batch' };
    await deliver([{ ...event({ tenant, ...names }), of_a_newer_edge: 1 }]);
    const { fallbacks } = await stats(`tenant=${tenant}`);
    expect(fallbacks).toEqual([{ reason: 'mask_worn_out', requests: 1 }]);
  });

  it('of a fault is told from one of the client', async () => {
    const id = await experiment();
    const of = (status: number, error_code: string | null) =>
      event({ experiment: id, variant: 'a', status, error_code });
    await deliver([
      ...[of(200, null), of(499, 'cancelled'), of(429, 'queue_full'), of(400, 'unknown_mask')],
      ...[of(503, 'backend_unreachable'), of(200, 'backend_error'), of(499, 'deadline_exceeded')],
      of(200, 'invalid_schema'),
    ]);
    expect((await results(id)).variants[0]!.figures).toMatchObject({ requests: 8, errors: 2 });
  });
});

describe('a rating or a comparison', () => {
  it('counts under its request, once, and waits for it when it comes first', async () => {
    const id = await experiment();
    const request = event({ experiment: id, variant: 'b' });
    const about = { request: request.id, tenant: request.tenant, created_at_ms: Date.now() };
    const rating: EdgeEvent = { kind: 'rating', ...about, key_id: 'k_1', rating: 1 };
    const comparison: EdgeEvent = { kind: 'comparison', ...about, agreement: 0.75, saved: 0.2 };
    expect(await deliver([rating, comparison])).toMatchObject({ retried: ['m0', 'm1'], acked: [] });
    expect(await deliver([rating, request, comparison])).toMatchObject({ retried: [] });
    await deliver([rating, comparison]);
    await deliver([{ ...rating, key_id: 'k_2', rating: -1 }]);
    const { variants } = await results(id);
    expect(variants[1]!.figures).toMatchObject({
      requests: 1,
      ratings: 2,
      rating_up: 0.5,
      compared: 1,
      agreement: 0.75,
    });
  });

  it("of another tenant's request is never counted", async () => {
    const id = await experiment();
    const request = event({ experiment: id, variant: 'b' });
    await deliver([request]);
    const about = { request: request.id, tenant: 'else', created_at_ms: Date.now() };
    const rating: EdgeEvent = { kind: 'rating', ...about, key_id: 'k_9', rating: -1 };
    expect((await deliver([rating])).retried).toEqual(['m0']);
    expect((await results(id)).variants[1]!.figures.ratings).toBe(0);
  });
});

it('differences come with intervals, once there is enough to say something', async () => {
  const id = await experiment();
  const of = (variant: string, tpot_ms: number, region = 'EU/DE/FRA') =>
    event({
      ...{ experiment: id, variant, tpot_ms, region },
      // As b is quicker, it is later to begin, and says more.
      ...{ ttft_ms: 30 - tpot_ms, completion_tokens: 20 - tpot_ms },
    });
  const few = Array.from({ length: 50 }, (_, i) => [of('a', 10 + (i % 3)), of('b', 6 + (i % 3))]).flat();
  await deliver(few);
  const tpot = async (query = '') =>
    (await results(id, query)).comparisons.find(({ metric }) => metric === 'tpot_ms');
  expect(await tpot()).toMatchObject({ verdict: 'too_few', difference: null });
  for (let i = 0; i < 3; i++) await deliver(few.map((one) => ({ ...one, id: hex(10) })));
  const found = (await tpot())!;
  expect(found).toMatchObject({ variant: 'b', verdict: 'better' });
  expect(found.difference).toBeCloseTo(-4);
  expect(found.low).toBeLessThan(-4);
  expect(found.high).toBeGreaterThan(-4);
  expect(found.high).toBeLessThan(0);
  expect(found.p_value).toBeLessThan(0.001);
  const verdicts = (await results(id)).comparisons.map(({ metric, verdict }) => [metric, verdict]);
  expect(Object.fromEntries(verdicts)).toMatchObject({ ttft_ms: 'worse', completion_tokens: 'differs' });
  expect(await tpot('?region=EU/DE')).toMatchObject({ verdict: 'better' });
  expect(await tpot('?region=EU/D')).toMatchObject({ verdict: 'too_few' });
});

describe('who answered', () => {
  const at = (ttft_ms: number | null, change: Partial<RequestEvent> = {}) =>
    event({ ttft_ms, tpot_ms: 5, ...change });
  const backends = async (query = '') => (await stats(query)).backends;
  const timesOf = async (id: string) => (await backends()).find(({ backend }) => backend === id);

  it('has quantiles of its own, over all tenants, each request counted once', async () => {
    const fast = Array.from({ length: 40 }, (_, i) => at(10, { tenant: `of-${i}`, backend: 'fast-one' }));
    const slow = Array.from({ length: 20 }, () => at(800, { tpot_ms: null, backend: 'slow-one' }));
    const failure = { tpot_ms: null, status: 502, error_code: 'backend_error', backend: 'slow-one' };
    const message = [...fast, ...slow, at(null, failure)];
    await deliver([message]);
    await deliver([message]);
    await Promise.all([deliver([message]), deliver([message, ...fast])]);
    const quick = (await timesOf('fast-one'))!;
    expect(quick.answers).toBe(40);
    within(quick.ttft_quantiles_ms!.p50, 10);
    within(quick.ttft_quantiles_ms!.p99, 10);
    within(quick.tpot_quantiles_ms!.p50, 5);
    const late = (await timesOf('slow-one'))!;
    expect(late).toMatchObject({ answers: 20, tpot_quantiles_ms: null });
    within(late.ttft_quantiles_ms!.p50, 800);
  });

  it('is not said of one tenant', async () => {
    const { tenant } = await newTenant();
    await deliver([[at(10, { tenant, backend: 'shared-one' })]]);
    expect(await timesOf('shared-one')).toMatchObject({ answers: 1 });
    expect(await backends(`tenant=${tenant}`)).toEqual([]);
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    const own = statsSchema.parse(await (await admin('GET', '/stats', undefined, key)).json());
    expect(own.versions).toMatchObject([{ figures: { requests: 1 } }]);
    expect(own.backends).toEqual([]);
  });

  it('may be nobody', async () => {
    const before = await backends();
    await deliver([[at(10)]]);
    expect(await backends()).toEqual(before);
  });

  it('takes a row a bucket and ten minutes, however many requests, tenants and versions there are', async () => {
    const events = Array.from({ length: 300 }, (_, i) =>
      at(10, {
        tenant: `t-${i}`,
        version: `v_${i}`,
        backend: 'busy-one',
        created_at_ms: Date.now() - (i % 60_000),
      }),
    );
    await deliver([events]);
    const { results: rows } = await env.DB.prepare(
      "SELECT minute, count FROM backend_latencies WHERE backend = 'busy-one' AND measure = 'ttft'",
    ).all<{ minute: number; count: number }>();
    expect(rows.length).toBeLessThanOrEqual(2);
    expect(rows.reduce((sum, { count }) => sum + count, 0)).toBe(300);
    for (const { minute } of rows) expect(minute % 10).toBe(0);
  });
});

it('stats say how routing falls out, and warn when it collapses', async () => {
  const { tenant } = await newTenant();
  const { version } = await goLive('watched', tenant);
  const at = (cluster: number | null, change: Partial<RequestEvent> = {}) =>
    event({ tenant, version, cluster, mask: 'm_x', sparsity: 0.25, ...change });
  const even = Array.from({ length: 60 }, (_, i) => at(i % 3));
  const fallback = at(null, { fallback: 'encoder_timeout', mask: 'dense', sparsity: 0 });
  await deliver([...even, fallback]);
  const query = `tenant=${tenant}&step=minute`;
  const first = await stats(query);
  expect(first.balance).toMatchObject([{ version, requests: 60, clusters: 3, collapsed: false }]);
  expect(first.balance[0]!.entropy_bits).toBeCloseTo(Math.log2(3));
  expect(first.fallbacks).toEqual([{ reason: 'encoder_timeout', requests: 1 }]);
  expect(first.versions.map(({ sparsity, figures }) => [sparsity, figures.requests])).toEqual([
    [0, 1],
    [0.25, 60],
  ]);
  for (let i = 0; i < 10; i++) await deliver(Array.from({ length: 90 }, () => at(1)));
  const [balance] = (await stats(query)).balance;
  expect(balance!.largest_share).toBeCloseTo(920 / 960);
  expect(balance!.collapsed).toBe(true);
  const nobody = await newTenant();
  expect((await stats(`tenant=${nobody.tenant}`)).routing).toEqual([]);
  expect((await admin('GET', '/stats?step=minute&from=2020-01-01T00:00:00Z')).status).toBe(400);
});

describe('drift', () => {
  const DAY_ms = 86_400_000;
  /** One of twenty prompts lies farther than 0.9 from every centroid. */
  const NEAREST = { rows: 400, median: 0.6, far: 0.9 };

  async function watched(heldOut: MaskSet['heldOut'] = { nearest: NEAREST }) {
    const { tenant } = await newTenant();
    const { version } = await upload(makeMaskSet(`watched-${hex(4)}`, { heldOut }), tenant);
    const drift = async (): Promise<Drift> =>
      driftSchema.parse(await (await admin('GET', `/drift?tenant=${tenant}&version=${version}`)).json());
    /** Requests that were compared with the dense model, each with its agreement. */
    const compared = async (cluster: number, agreements: readonly number[], at_ms: number) => {
      const created_at_ms = Date.now() + at_ms;
      const requests = agreements.map(() => event({ tenant, version, cluster, mask: 'm_x', created_at_ms }));
      const comparisons = requests.map(({ id }, i) => ({
        kind: 'comparison',
        request: id,
        tenant,
        created_at_ms,
        agreement: agreements[i],
        saved: null,
      }));
      await deliver(requests);
      await deliver(comparisons);
    };
    const lay = async (distances: readonly number[]) => {
      const db = openDatabase(env.DB);
      for (const distance of distances) {
        const place = { cluster: 0, distances: [distance, distance + 0.1, 1.9] };
        await insertTrafficSample(db, { tenant, version, ...place, createdAt_ms: Date.now() });
      }
    };
    return { drift, compared, lay, tenant, version };
  }
  const around = (mean: number, count: number) =>
    Array.from({ length: count }, (_, i) => mean + (i % 2 === 0 ? 0.05 : -0.05));

  it('shows in requests that lie far from every cluster, and is answered with learning again', async () => {
    const { drift, lay } = await watched();
    await lay(around(0.6, 20));
    expect(await drift()).toMatchObject({ distance: { samples: 20, far_share: null }, proposal: null });
    await lay(around(0.6, 100));
    const before = await drift();
    expect(before).toMatchObject({ distance: { samples: 120, limit: 0.9, far_share: 0, drifted: false } });
    expect(before.proposal).toBeNull();
    await lay(around(1.3, TRAFFIC_SAMPLES_MAX / 2));
    const { distance, proposal } = await drift();
    expect(distance).toMatchObject({ samples: 270, drifted: true });
    expect(distance!.far_share).toBeCloseTo(150 / 270);
    expect(distance!.low).toBeGreaterThan(0.1);
    expect(proposal).toMatch(/^Learn again with recent prompts: 56 % of recent requests lie farther /);
  });

  it('shows in a cluster whose answers part from dense ones sooner than before, and in no other', async () => {
    const { drift, compared } = await watched();
    for (const cluster of [0, 1]) await compared(cluster, around(0.9, 60), -2 * DAY_ms);
    await compared(0, around(0.9, 60), 0);
    await compared(1, around(0.5, 20), 0);
    expect(await drift()).toMatchObject({ proposal: null });
    await compared(1, around(0.5, 40), 0);
    const { clusters, proposal } = await drift();
    expect(clusters.map(({ cluster, drifted }) => [cluster, drifted])).toEqual([
      [0, false],
      [1, true],
    ]);
    expect(clusters[1]).toMatchObject({ before: { pairs: 60 }, recent: { pairs: 60 } });
    expect(clusters[1]!.before.mean).toBeCloseTo(0.9);
    expect(proposal).toMatch(/answers of cluster 1 part from the dense model's sooner/);
  });

  it('is not said of a set that keeps quiet about its prompts, nor of another tenant', async () => {
    const { drift, lay, version } = await watched({ learned: { agreement: 0.9 } });
    await lay(around(1.5, 60));
    expect(await drift()).toMatchObject({ distance: null, clusters: [], proposal: null });
    const other = await newTenant();
    const asked = admin('GET', `/drift?tenant=${other.tenant}&version=${version}`);
    expect((await asked).status).toBe(404);
  });
});

it('a version is judged by the newest of its rows where there are very many', async () => {
  const { tenant } = await newTenant();
  const { version } = await goLive('of-many-rows', tenant);
  const at = (minutesAgo: number, status: number) =>
    event({ tenant, version, cluster: 0, status, created_at_ms: Date.now() - minutesAgo * 60_000 });
  await deliver([at(3, 500), at(2, 200), at(1, 500), at(0, 200)]);
  const judged = (rowsMax: number, of = tenant) =>
    judgedOfVersion(openDatabase(env.DB), version, of, Date.now() - 3_600_000, rowsMax);
  for (const of of [tenant, '']) {
    expect(await judged(10, of)).toMatchObject({ requests: 4, errors: 2 });
    expect(await judged(3, of)).toMatchObject({ requests: 3, errors: 1 });
  }
  expect(await judged(10, 'else')).toMatchObject({ requests: 0, errors: 0 });
});

it('a publication is compared with the one that it replaces, in the minutes in which both answered', async () => {
  const { tenant } = await newTenant();
  const compared = async () => {
    const response = await admin('GET', `/publications/comparison?tenant=${tenant}`);
    return releaseComparisonSchema.parse(await response.json());
  };
  const { version: before } = await goLive('compared-before', tenant);
  const now_ms = Date.now();
  const of = (version: string, minute: number, change: Partial<RequestEvent> = {}) =>
    event({ tenant, version, cluster: 0, created_at_ms: now_ms + minute * 60_000, ...change });
  const failed = { status: 500, error_code: 'engine_failed', ttft_ms: null, tpot_ms: null };
  await deliver([
    of(before, -10),
    ...[of(before, 1), of(before, 1, failed), of(before, 2, { ttft_ms: 99 })],
    // An outage, and what has none of its masks, say nothing of it.
    of(before, 1, { status: 503, error_code: 'backend_unreachable', ttft_ms: null, tpot_ms: null }),
    ...[of(before, 1, { cluster: null }), of(before, 1, { fallback: 'over_ceiling' })],
  ]);
  const alone = { requests: 3, errors: 1, error_rate: 1 / 3, ttft_ms: (20 + 99) / 2, tpot_ms: 6 };
  expect(await compared()).toMatchObject({ minutes: 2, sides: [{ version: before, ...alone }] });

  const { version: after } = await goLive('compared-after', tenant);
  expect(await compared()).toMatchObject({ minutes: 0, sides: [{ requests: 0, error_rate: null }, {}] });
  await deliver([
    ...[of(after, 1, { ttft_ms: 10, tpot_ms: 4 }), of(after, 1, { ttft_ms: 40, tpot_ms: 5 }), of(after, 3)],
    // The same set, live for other tenants.
    of(after, 1, { tenant: 'else' }),
  ]);
  expect(await compared()).toMatchObject({
    minutes: 1,
    sides: [
      { version: after, requests: 2, errors: 0, error_rate: 0, ttft_ms: 25, tpot_ms: 4.5 },
      { version: before, requests: 2, errors: 1, error_rate: 0.5, ttft_ms: 20, tpot_ms: 6 },
    ],
  });
});

describe('expired rows', () => {
  const leftOf = async (tenant: string) => {
    const asked = env.DB.prepare('select count(*) as rows from feedback where tenant_id = ?').bind(tenant);
    return (await asked.first<{ rows: number }>())!.rows;
  };

  it('are deleted in portions, as many at a time as D1 has time for', async () => {
    await env.DB.exec(
      `insert into feedback select 'long-ago', 'k', value, 1, null, 0 from json_each('[${Array.from({ length: 2_500 }, (_, i) => i)}]')`,
    );
    const none = { now_ms: 0, eventsSince_ms: 0, auditSince_ms: 0, minutesSince_ms: 0 };
    const db = openDatabase(env.DB);
    const kept = { ...none, feedbackSince_ms: 1 };
    await forget(db, kept, 0);
    expect(await leftOf('long-ago')).toBe(2_500);
    // One portion of every kind, and one more of the only kind that has more.
    await forget(db, kept, 60_000, 7 + 1);
    expect(await leftOf('long-ago')).toBe(500);
    await edge.scheduled({} as never, env as never);
    expect(await leftOf('long-ago')).toBe(0);
  });

  it('of every kind go once they have expired, and not before', async () => {
    const { tenant } = await newTenant();
    const at_ms = 5 * 60_000;
    await deliver([event({ tenant, backend: tenant })]);
    const ofTenant = `tenant = '${tenant}'`;
    const kinds: Record<string, [time: string, mine: string]> = {
      events: [`created_at_ms = ${at_ms}`, ofTenant],
      outcomes: ['minute = 5', ofTenant],
      latencies: ['minute = 5', ofTenant],
      backend_latencies: ['minute = 5', `backend = '${tenant}'`],
      audit_log: [`created_at_ms = ${at_ms}`, ofTenant],
    };
    await env.DB.exec(
      `insert into audit_log (created_at_ms, tenant, actor, address, action, target, request_id) values (0, '${tenant}', '', '', '', '', '')`,
    );
    for (const [table, [time, mine]] of Object.entries(kinds))
      await env.DB.exec(`update ${table} set ${time} where ${mine}`);
    const left = async () => {
      const tables = Object.entries(kinds).map(async ([table, [, mine]]) => {
        const row = await env.DB.prepare(`select 1 from ${table} where ${mine}`).first();
        return row === null ? [] : [table];
      });
      return (await Promise.all(tables)).flat();
    };
    const forgetBefore = (since_ms: number) => {
      const kept = { eventsSince_ms: since_ms, auditSince_ms: since_ms, minutesSince_ms: since_ms };
      return forget(openDatabase(env.DB), { now_ms: 0, feedbackSince_ms: 0, ...kept }, 60_000);
    };
    await forgetBefore(at_ms);
    expect(await left()).toEqual(Object.keys(kinds));
    await forgetBefore(at_ms + 60_000);
    expect(await left()).toEqual([]);
  });

  it('that cannot be deleted hold up neither counting nor other kinds', async () => {
    await env.DB.exec(`insert into feedback values ('stuck', 'k', 'c', 1, null, 0)`);
    await env.DB.exec(`insert into texts values ('stuck', 'stuck', 1, 'a prompt', 'an answer')`);
    await env.DB.exec(
      `create trigger stuck before delete on feedback when old.tenant_id = 'stuck' begin select raise(abort, 'stuck'); end`,
    );
    const id = await experiment();
    expect(await deliver([event({ experiment: id, variant: 'a' })])).toMatchObject({ retriedAll: false });
    expect((await results(id)).variants[0]!.figures.requests).toBe(1);
    const logged = vi.spyOn(console, 'error').mockImplementation(() => {});
    await edge.scheduled({} as never, env as never);
    expect(logged.mock.calls.join()).toContain('expired_rows_not_deleted');
    logged.mockRestore();
    expect(await env.DB.prepare("select * from texts where event = 'stuck'").first()).toBeNull();
    expect(await leftOf('stuck')).toBe(1);
    await env.DB.exec('drop trigger stuck');
    await edge.scheduled({} as never, env as never);
    expect(await leftOf('stuck')).toBe(0);
  });

  it('stay while D1 fails, and the log says so', async () => {
    const d1 = badD1();
    d1.be('failing');
    const logged = vi.spyOn(console, 'error').mockImplementation(() => {});
    await edge.scheduled({} as never, { ...env, DB: d1.DB } as never);
    const lines = logged.mock.calls.map(([line]) => String(line));
    logged.mockRestore();
    expect(lines.find((line) => line.includes('expired_rows_not_deleted'))).toContain('overloaded');
  });
});

describe('a version that does worse than it may', () => {
  async function guarded(auto_rollback: object) {
    const { tenant } = await newTenant();
    const { version: old } = await goLive('old', tenant);
    const { version } = await upload(makeMaskSet('worse'), tenant);
    await activate(version, { tenant, auto_rollback });
    const history = async () =>
      (await (await admin('GET', `/publications?tenant=${tenant}`)).json<{ data: Publication[] }>()).data;
    const of = (change: Partial<RequestEvent>) => event({ tenant, version, cluster: 0, ...change });
    return { tenant, old, version, history, of };
  }

  it('is taken back when too many requests fail, and the history says why', async () => {
    const { old, version, history, of } = await guarded({ error_rate_max: 0.07, requests_min: 20 });
    const bad = () => of({ status: 502, error_code: 'backend_error' });
    await deliver([...Array.from({ length: 10 }, () => of({})), ...Array.from({ length: 9 }, bad)]);
    expect(await history()).toHaveLength(2);
    await deliver([bad()]);
    const [newest, ...others] = await history();
    expect(others).toHaveLength(2);
    expect(newest).toMatchObject({
      action: 'rollback',
      actor: 'auto-rollback',
      version: old,
      replaced_version: version,
    });
    expect(newest!.reason).toBe('10 of 20 requests failed, more than 7 %');
    await deliver([bad(), bad()]);
    expect(await history()).toHaveLength(3);
  });

  it('is taken back when it is slower than the one before by more than it may', async () => {
    const { old, tenant, history, of } = await guarded({ tpot_ratio_max: 1.2, requests_min: 10 });
    const before = Array.from({ length: 10 }, () => of({ version: old, tpot_ms: 5 }));
    await deliver([...before, ...Array.from({ length: 10 }, () => of({ tpot_ms: 5.9 }))]);
    expect(await history()).toHaveLength(2);
    const elsewhere = Array.from({ length: 20 }, () => of({ tenant: 'else', tpot_ms: 99 }));
    await deliver(elsewhere);
    expect(await history()).toHaveLength(2);
    await deliver(Array.from({ length: 10 }, () => of({ tpot_ms: 6.9 })));
    const [newest] = await history();
    expect(newest).toMatchObject({ tenant, action: 'rollback', version: old });
    expect(newest!.reason).toMatch(/6\.40 ms a token over 20 requests, more than 1\.2 times the 5\.00 ms/);
  });

  it('is taken back when it is the first, though nothing came before', async () => {
    const { tenant } = await newTenant();
    const { version } = await upload(makeMaskSet('first-and-worse'), tenant);
    await activate(version, { tenant, auto_rollback: { error_rate_max: 0.1, requests_min: 2 } });
    const bad = () => event({ tenant, version, cluster: 0, status: 502, error_code: 'backend_error' });
    await deliver([bad(), bad()]);
    const list = await admin('GET', `/publications?tenant=${tenant}`);
    const { data } = await list.json<{ data: Publication[] }>();
    expect(data[0]).toMatchObject({ actor: 'auto-rollback', version: null, replaced_version: version });
    expect(data[0]!.reason).toMatch(/2 of 2 requests failed/);
    expect((await admin('GET', `/publications/live?tenant=${tenant}`)).status).toBe(404);
  });

  it('is taken back for another one, though it was live before, without bounds', async () => {
    const { tenant } = await newTenant();
    const { version: old } = await goLive('old', tenant);
    const { version } = await goLive('worse', tenant);
    await activate(version, { tenant, auto_rollback: { error_rate_max: 0.1, requests_min: 2 } });
    const live = async () =>
      await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<LivePublication>();
    expect(await live()).toMatchObject({ version, previous_version: old });
    const bad = () => event({ tenant, version, cluster: 0, status: 502, error_code: 'backend_error' });
    await deliver([bad(), bad()]);
    expect(await live()).toMatchObject({ version: old, actor: 'auto-rollback', previous_version: null });
  });

  it('is not taken back once it was published anew: that one was not judged', async () => {
    const { tenant, version, history, of } = await guarded({ error_rate_max: 0.1, requests_min: 2 });
    const d1 = badD1();
    d1.be('slow');
    const bad = () => of({ status: 502, error_code: 'backend_error' });
    const delivered = deliver([bad(), bad()], { DB: d1.DB });
    // The events are counted and the publication is found: it is being judged.
    await vi.waitFor(() => expect(d1.asked()).toBe(3), { timeout: 12_000, interval: 5 });
    const again = await activate(version, { tenant });
    const logged = vi.spyOn(console, 'info').mockImplementation(() => {});
    await delivered;
    const lines = logged.mock.calls.map(([line]) => String(line));
    logged.mockRestore();
    // Nobody is told to roll back by hand.
    expect(lines.find((line) => line.includes('auto_rollback_not_needed'))).toContain(version);
    const [newest, ...others] = await history();
    expect(newest).toEqual(again);
    expect(others).toHaveLength(2);
  });

  it('holds no delivery for ever while D1 stalls', async () => {
    const { history, of } = await guarded({ error_rate_max: 0.1, requests_min: 2 });
    let asked = 0;
    // It counts, and says nothing of versions.
    const ask = (question: () => unknown) => (++asked === 1 ? question() : new Promise(() => {}));
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    const bad = () => of({ status: 502, error_code: 'backend_error' });
    const delivered = deliver([bad(), bad()], { DB: interceptedD1(env.DB, ask) });
    await vi.waitFor(() => expect(asked).toBe(2), 12_000);
    await vi.advanceTimersByTimeAsync(EVENTS.judge_ms);
    expect(await delivered).toMatchObject({ retriedAll: false, acked: ['m0', 'm1'] });
    vi.useRealTimers();
    // The next one finds it.
    await deliver([bad()]);
    expect((await history())[0]).toMatchObject({ action: 'rollback' });
  });

  it('is not blamed for requests that carry its name and none of its masks', async () => {
    const { history, of } = await guarded({ error_rate_max: 0.1, tpot_ms_max: 10, requests_min: 10 });
    const slow = { tpot_ms: 30 };
    const failed = { tpot_ms: null, status: 502, error_code: 'backend_error' };
    const requested = { cluster: null, fallback: 'requested', mask: 'dense' } as const;
    const unlike = { cluster: 1, fallback: 'low_similarity', mask: 'dense' } as const;
    const own = { cluster: null, mask: 'custom' } as const;
    for (const without of [requested, unlike, own]) {
      await deliver(
        [slow, failed].flatMap((how) => Array.from({ length: 30 }, () => of({ ...without, ...how }))),
      );
    }
    await deliver(Array.from({ length: 20 }, () => of({ tpot_ms: 6 })));
    expect(await history()).toHaveLength(2);
    // Nor does quick company excuse it.
    await deliver(Array.from({ length: 200 }, () => of({ ...requested, tpot_ms: 1 })));
    await deliver(Array.from({ length: 20 }, () => of({ tpot_ms: 16 })));
    expect((await history())[0]!.reason).toMatch(/11\.00 ms a token over 40 requests/);
  });

  it("is not blamed for the playground's requests, nor excused by them, and they are still counted", async () => {
    const bounds = { error_rate_max: 0.1, tpot_ms_max: 10, requests_min: 10 };
    const { tenant, version, history, of } = await guarded(bounds);
    const failed = { ttft_ms: null, tpot_ms: null, status: 502, error_code: 'backend_error' };
    const tried = (change: Partial<RequestEvent>) =>
      Array.from({ length: 30 }, () => of({ source: 'playground', ...change }));
    const trial = of({ source: 'playground' });
    await deliver([...tried({ tpot_ms: 30 }), ...tried(failed), trial]);
    const about = { request: trial.id, tenant, created_at_ms: Date.now() };
    await deliver([{ kind: 'rating', ...about, key_id: 'k_1', rating: 1 }]);
    expect(await history()).toHaveLength(2);
    const compared = await admin('GET', `/publications/comparison?tenant=${tenant}`);
    expect(await compared.json()).toMatchObject({ sides: [{ version, requests: 0 }, {}] });
    const { versions, balance } = await stats(`tenant=${tenant}`);
    expect(versions).toMatchObject([{ version, figures: { requests: 61, errors: 30, ratings: 1 } }]);
    expect(balance).toEqual([]);
    await deliver(tried({ tpot_ms: 1 }));
    // An experiment's variant of that name is not the playground.
    const variant = { experiment: 'speed', variant: 'playground' };
    await deliver(Array.from({ length: 10 }, () => of({ ...variant, tpot_ms: 16 })));
    expect((await history())[0]!.reason).toMatch(/16\.00 ms a token over 10 requests/);
  });

  it('is not taken back by an outage, and a fault of its own shows through one', async () => {
    const { history, of } = await guarded({ error_rate_max: 0.1, requests_min: 10 });
    const codes = ['backend_unreachable', 'not_ready', 'queue_timeout', 'configuration_unavailable'];
    const outage = codes.map((error_code) => ({ status: 503, error_code }));
    const late = { status: 200, error_code: 'deadline_exceeded' };
    const lost = () => [...outage, late].flatMap((how) => Array.from({ length: 40 }, () => of(how)));
    await deliver([...lost(), ...Array.from({ length: 18 }, () => of({}))]);
    expect(await history()).toHaveLength(2);
    await deliver(Array.from({ length: 3 }, () => of({ status: 500, error_code: 'engine_failed' })));
    expect((await history())[0]!.reason).toMatch(/3 of 21 requests failed/);
  });

  it('is taken back within minutes when it turns bad after a long good time', async () => {
    const { history, of } = await guarded({ error_rate_max: 0.1, tpot_ms_max: 10, requests_min: 20 });
    for (let i = 0; i < 4; i++) await deliver(Array.from({ length: 250 }, () => of({})));
    later(3_600_000);
    await deliver(Array.from({ length: 20 }, () => of({ status: 500, error_code: 'engine_failed' })));
    expect((await history())[0]!.reason).toMatch(/20 of 20 requests failed/);
  });

  it('is judged by two hours where a quarter of one has too few requests', async () => {
    const { history, of } = await guarded({ error_rate_max: 0.1, requests_min: 20 });
    const bad = () => of({ status: 500, error_code: 'engine_failed' });
    await deliver(Array.from({ length: 10 }, bad));
    later(3_600_000);
    await deliver(Array.from({ length: 9 }, bad));
    expect(await history()).toHaveLength(2);
    await deliver([bad()]);
    expect((await history())[0]!.reason).toMatch(/20 of 20 requests failed/);
  });

  it('is judged by a day where two hours have too few requests, and by no more than that', async () => {
    const { history, of } = await guarded({ error_rate_max: 0.1, requests_min: 20 });
    const bad = () => of({ status: 500, error_code: 'engine_failed' });
    await deliver(Array.from({ length: 10 }, bad));
    later(25 * 3_600_000);
    await deliver(Array.from({ length: 12 }, bad));
    expect(await history()).toHaveLength(2);
    later(20 * 3_600_000);
    await deliver(Array.from({ length: 7 }, bad));
    expect(await history()).toHaveLength(2);
    await deliver([bad()]);
    expect((await history())[0]!.reason).toMatch(/20 of 20 requests failed/);
  });

  it('is judged from when it went live, and not by what was counted of it before', async () => {
    const { tenant, old, version, history, of } = await guarded({ error_rate_max: 0.9, requests_min: 10 });
    const bad = (minutesAgo: number) =>
      of({ status: 502, error_code: 'backend_error', created_at_ms: Date.now() - minutesAgo * 60_000 });
    await deliver(Array.from({ length: 10 }, () => bad(5)));
    await activate(old, { tenant });
    await activate(version, { tenant, auto_rollback: { error_rate_max: 0.1, requests_min: 10 } });
    await deliver(Array.from({ length: 10 }, () => of({})));
    const [newest] = await history();
    expect(newest).toMatchObject({ action: 'activate', version });
  });

  it('is kept while it reaches its bounds and does not cross them', async () => {
    const bounds = { error_rate_max: 0.1, tpot_ms_max: 10, tpot_ratio_max: 2, requests_min: 10 };
    const { old, history, of } = await guarded(bounds);
    const before = Array.from({ length: 10 }, () => of({ version: old, tpot_ms: 5 }));
    const bad = () => of({ tpot_ms: null, status: 502, error_code: 'backend_error' });
    await deliver([...before, ...Array.from({ length: 18 }, () => of({ tpot_ms: 10 })), bad(), bad()]);
    expect(await history()).toHaveLength(2);
    await deliver([bad()]);
    expect((await history())[0]!.reason).toMatch(/^3 of 21 requests failed/);
  });

  it('is judged by each bound alone: that one lacks requests makes no older ones count for another', async () => {
    const bounds = { error_rate_max: 0.1, tpot_ratio_max: 1.2, requests_min: 20 };
    const { old, history, of } = await guarded(bounds);
    const created_at_ms = Date.now();
    later(3_600_000);
    // Such as come late: the queue was slow.
    const late = Array.from({ length: 30 }, () =>
      of({ status: 500, error_code: 'engine_failed', created_at_ms }),
    );
    const before = Array.from({ length: 20 }, () => of({ version: old, tpot_ms: 5, created_at_ms }));
    await deliver([...late, ...Array.from({ length: 20 }, () => of({ tpot_ms: 5 }))]);
    expect(await history()).toHaveLength(2);
    later(10 * 3_600_000);
    await deliver([...before, ...Array.from({ length: 60 }, () => of({ tpot_ms: 7 }))]);
    expect((await history())[0]!.reason).toMatch(/more than 1\.2 times the 5\.00 ms/);
  });

  it('without bounds stays, whatever it does', async () => {
    const { tenant } = await newTenant();
    await goLive('old', tenant);
    const { version } = await goLive('bad', tenant);
    const bad = () => event({ tenant, version, cluster: 0, status: 500, error_code: 'engine_failed' });
    await deliver(Array.from({ length: 90 }, bad));
    const live = await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<Publication>();
    expect(live.version).toBe(version);
  });
});
