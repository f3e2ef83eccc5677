/** Bodies that nobody would write: every one is answered with a reason, none with a server error. */
import fc from 'fast-check';
import { beforeAll, expect, it } from 'vitest';
import { ADMIN_KEY, EDGE_URL } from '../../support/edge/constants.ts';
import {
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  goLive,
  makeMaskSet,
  newTenant,
} from '../support/edge.ts';
import { limitedTenant } from '../support/limits.ts';

const isolate = freshIsolate();
let key: string;
beforeAll(async () => {
  const made = await newTenant();
  key = made.key;
  await goLive('compass', made.tenant);
});

const RUNS = { numRuns: 100, endOnFailure: true };
/** Half a character, none at all, and names that every object has. */
const strange = fc.constantFrom(
  '\u0000',
  'a\u0000b',
  '\ud800',
  'x\udfff',
  '__proto__',
  'constructor',
  '.',
  '..',
);
const json = fc.oneof(
  { weight: 3, arbitrary: fc.jsonValue({ maxDepth: 3 }) },
  { weight: 1, arbitrary: strange },
  { weight: 1, arbitrary: fc.array(strange, { maxLength: 3 }) },
);

/** A valid object with some of its fields, at any depth, replaced or new ones added. */
const damaged = (valid: object): fc.Arbitrary<unknown> =>
  fc
    .array(fc.tuple(fc.array(fc.nat(20), { minLength: 1, maxLength: 4 }), json), {
      minLength: 1,
      maxLength: 3,
    })
    .map((changes) => {
      const copy = structuredClone(valid) as Record<string, unknown>;
      for (const [path, value] of changes) replaceAt(copy, path, value);
      return copy;
    });

function replaceAt(target: Record<string, unknown>, path: number[], value: unknown): void {
  const names = Object.keys(target);
  const name = names[path[0]! % (names.length + 1)] ?? 'extra';
  const inner = target[name];
  if (path.length > 1 && typeof inner === 'object' && inner !== null) {
    replaceAt(inner as Record<string, unknown>, path.slice(1), value);
  } else target[name] = value;
}

async function expectReason(response: Response): Promise<void> {
  // An answer that nobody reads would hold its connection.
  if (response.ok) return void (await response.text());
  expect(await errorCode(response)).toMatch(/^4\d\d [a-z_]+$/);
}

const optionalFields = {
  stream: false,
  temperature: 1,
  stop: ['x'],
  mask: { skipFfn: [1] },
  user: 'u',
  n: 1,
};

it('completions', async () => {
  const valid = fc.oneof(json, damaged({ ...CHAT, ...optionalFields }), damaged({ model: 'm', prompt: 'x' }));
  await fc.assert(
    fc.asyncProperty(valid, async (body) => {
      await expectReason(await call('POST', '/v1/route', { key, body: JSON.stringify(body) }, isolate));
    }),
    RUNS,
  );
});

it('completions that a backend answers, of a tenant with limits', async () => {
  const body = { ...CHAT, ...optionalFields, stream: true, max_tokens: 3, user: 'u' };
  const legacy = { model: CHAT.model, prompt: ['x', 'y'], max_tokens: 2, n: 2, logprobs: 1 };
  const requests = fc.oneof(
    fc.tuple(fc.constant('/v1/chat/completions'), damaged(body)),
    fc.tuple(fc.constant('/v1/completions'), damaged(legacy)),
    fc.tuple(fc.constant('/v1/feedback'), damaged({ id: 'chatcmpl-1', rating: 1, comment: 'x' })),
  );
  const limited = await limitedTenant({ tokens_per_day: 1e12, sparsity_max: 0.5, models: [CHAT.model] });
  await fc.assert(
    fc.asyncProperty(requests, async ([path, body]) => {
      await expectReason(await call('POST', path, { key: limited.key, body: JSON.stringify(body) }, isolate));
    }),
    { ...RUNS, numRuns: 100, examples: [[['/v1/chat/completions', { ...body, user: '__proto__' }]]] },
  );
}, 60_000);

it('texts that are no JSON', async () => {
  await fc.assert(
    fc.asyncProperty(fc.uint8Array({ maxLength: 100 }), async (body) => {
      await expectReason(await call('POST', '/v1/route', { key, body }, isolate));
    }),
    RUNS,
  );
});

const EXPERIMENT = {
  id: 'a',
  description: 'x',
  models: ['m'],
  regions: [{ country: 'DE' }],
  sticky: 'user',
  variants: ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' })),
  starts_at: '2030-01-01T00:00:00Z',
  ends_at: '2031-01-01T00:00:00Z',
  shadow_share: 0.1,
  alpha: 0.05,
};

it('the admin API', async () => {
  const bodies = (valid: object) => fc.oneof(json, damaged(valid));
  const requests = fc.oneof(
    fc.tuple(
      fc.constant('/tenants'),
      bodies({ id: 'a', name: 'a', routing_policy: 'last_user', models: ['m'], tokens_per_day: 1 }),
    ),
    fc.tuple(fc.constant('/keys/k_1/rotate'), bodies({ overlap_s: 1, expires_at: '2030-01-01T00:00:00Z' })),
    fc.tuple(fc.constant('/keys'), bodies({ kind: 'tenant', tenant: 'tenant-1', name: 'x' })),
    fc.tuple(fc.constant('/mask-sets'), bodies(makeMaskSet('fuzz'))),
    fc.tuple(
      fc.constant('/publications'),
      bodies({
        version: `v_${'0'.repeat(24)}`,
        tenant: 'tenant-1',
        activate_at: '2030-01-01T00:00:00Z',
        rollout: [{ share: 0.1, duration_s: 60 }],
        auto_rollback: { error_rate_max: 0.1, requests_min: 10 },
      }),
    ),
    fc.tuple(fc.constant('/experiments'), bodies(EXPERIMENT)),
    fc.tuple(fc.constant('/publications/rollback'), bodies({ tenant: 'tenant-1', expected_version: null })),
  );
  await fc.assert(
    fc.asyncProperty(requests, async ([path, body]) => {
      await expectReason(
        await call('POST', `/admin/v1${path}`, { key: ADMIN_KEY, body: JSON.stringify(body) }, isolate),
      );
    }),
    { ...RUNS, numRuns: 200 },
  );
});

it('changes of an experiment', async () => {
  const { id, ...definition } = { ...EXPERIMENT, id: 'fuzzed' };
  const made = await call('POST', '/admin/v1/experiments', { key: ADMIN_KEY, body: { ...definition, id } });
  expect(made.status).toBe(201);
  await fc.assert(
    fc.asyncProperty(fc.oneof(json, damaged(definition)), async (body) => {
      const path = `/admin/v1/experiments/${id}`;
      await expectReason(await call('PATCH', path, { key: ADMIN_KEY, body: JSON.stringify(body) }, isolate));
    }),
    RUNS,
  );
});

it('changes of a tenant', async () => {
  const valid = {
    name: 'a',
    routing_policy: 'last_user',
    enabled: true,
    models: ['m'],
    sparsity_max: 0.5,
    agreement_min: 0.5,
    requests_per_minute: 1,
    tokens_per_day: null,
  };
  const { tenant } = await limitedTenant({});
  // So that there is something to be warned of.
  await goLive('warned', tenant);
  await fc.assert(
    fc.asyncProperty(fc.oneof(json, damaged(valid)), async (body) => {
      const path = `/admin/v1/tenants/${tenant}`;
      await expectReason(await call('PATCH', path, { key: ADMIN_KEY, body: JSON.stringify(body) }, isolate));
      expect((await call('GET', path, { key: ADMIN_KEY }, isolate)).status).toBe(200);
    }),
    RUNS,
  );
});

it('ratings of a completion that is there', async () => {
  const answer = await (await chat(key, {}, isolate)).json<{ id: string }>();
  await fc.assert(
    fc.asyncProperty(damaged({ id: answer.id, rating: 1, comment: 'x' }), async (body) => {
      await expectReason(await call('POST', '/v1/feedback', { key, body: JSON.stringify(body) }, isolate));
    }),
    RUNS,
  );
});

it('jobs for a backend that is not there', async () => {
  const learn = { kind: 'learn', data: [{ upload: `data_${'0'.repeat(24)}` }], clusters: 2, sparsity: 0.1 };
  const requests = fc.oneof(
    fc.tuple(fc.constant(''), damaged({ ...learn, model: 'm', name: 'x', rows: 1, cost: 'time' })),
    fc.tuple(fc.constant(`/job_${'0'.repeat(24)}/store`), damaged({ tenant: '' })),
    fc.tuple(
      fc.constantFrom('.', '..', 'job_', '%00', '__proto__').map((job) => `/${job}/cancel`),
      json,
    ),
    fc.tuple(
      fc.string({ unit: 'grapheme' }).map((name) => `/data?name=${encodeURIComponent(name)}`),
      json,
    ),
  );
  await fc.assert(
    fc.asyncProperty(requests, async ([path, body]) => {
      const route = `/admin/v1/backends/nobody/jobs${path}`;
      await expectReason(await call('POST', route, { key: ADMIN_KEY, body: JSON.stringify(body) }, isolate));
    }),
    RUNS,
  );
});

it('headers', async () => {
  const value = fc.string({ unit: 'grapheme-ascii' });
  const names = ['authorization', 'cookie', 'x-request-id', 'x-maskroute-deadline-ms', 'x-maskroute-csrf'];
  const headers = fc.dictionary(fc.constantFrom(...names, 'origin', 'content-type', 'accept'), value);
  const places = fc.constantFrom(
    'GET /admin/v1/tenants',
    'POST /v1/chat/completions',
    'DELETE /dashboard/session',
  );
  await fc.assert(
    fc.asyncProperty(places, headers, async (place, more) => {
      const [method, path] = place.split(' ') as [string, string];
      const body = method === 'POST' ? { body: CHAT } : {};
      await expectReason(await call(method, path, { key, ...body, headers: more }, isolate));
    }),
    RUNS,
  );
});

it('queries and paths of the admin API', async () => {
  const paths = [
    '/keys?tenant=',
    '/mask-sets?tenant=',
    '/mask-sets/',
    '/publications?tenant=',
    '/publications/live?tenant=',
    '/tenants/',
    '/usage?tenant=',
    '/usage?group=',
    '/usage?from=',
    '/usage?after=',
    '/keys?before=',
    '/keys?state=',
    '/publications?limit=',
    '/experiments?tenant=',
    '/experiments/',
    '/experiments/x/results?region=',
    '/stats?tenant=',
    '/stats?from=',
    '/stats?step=',
    '/traffic?tenant=',
    '/traffic?version=',
    '/backends/',
    '/backends/nobody/jobs/',
  ];
  await fc.assert(
    fc.asyncProperty(
      fc.constantFrom(...paths),
      fc.oneof(fc.string({ unit: 'grapheme' }), fc.constantFrom('\u0000', '..', '__proto__')),
      async (path, text) => {
        await expectReason(
          await call('GET', `/admin/v1${path}${encodeURIComponent(text)}`, { key: ADMIN_KEY }, isolate),
        );
      },
    ),
    RUNS,
  );
});

it('changes by path', async () => {
  const places = fc.constantFrom(
    'DELETE /keys/',
    'DELETE /experiments/',
    'DELETE /backends/',
    'PATCH /tenants/',
    'PATCH /backends/',
  );
  await fc.assert(
    fc.asyncProperty(places, fc.string({ unit: 'grapheme', minLength: 1 }), async (place, id) => {
      const [method, path] = place.split(' ') as [string, string];
      const body = method === 'PATCH' ? { body: { enabled: false } } : {};
      const route = `/admin/v1${path}${encodeURIComponent(id)}`;
      await expectReason(await call(method, route, { key: ADMIN_KEY, ...body }, isolate));
    }),
    RUNS,
  );
});

// The last two: backends that are made here are real to what comes after, and guessed keys are counted.
it('the registry of backends', async () => {
  const valid = { url: 'http://127.0.0.1:9', regions: ['EU'], weight: 1, enabled: false };
  const requests = fc.oneof(
    fc.tuple(fc.constant('POST'), fc.constant(''), fc.oneof(json, damaged({ id: 'fuzzed', ...valid }))),
    fc.tuple(fc.constant('PATCH'), fc.constant('/fuzzed'), fc.oneof(json, damaged(valid))),
  );
  await fc.assert(
    fc.asyncProperty(requests, async ([method, path, body]) => {
      const route = `/admin/v1/backends${path}`;
      await expectReason(await call(method, route, { key: ADMIN_KEY, body: JSON.stringify(body) }, isolate));
    }),
    RUNS,
  );
});

it('logging in', async () => {
  const origin = { headers: { origin: EDGE_URL, 'sec-fetch-site': 'same-origin' } };
  await fc.assert(
    fc.asyncProperty(fc.oneof(json, damaged({ key: 'x' })), async (body) => {
      const said = call('POST', '/dashboard/session', { body: JSON.stringify(body), ...origin }, isolate);
      await expectReason(await said);
    }),
    RUNS,
  );
});
