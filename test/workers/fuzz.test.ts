/** Bodies that nobody would write: every one is answered with a reason, none with a server error. */
import fc from 'fast-check';
import { beforeAll, expect, it } from 'vitest';
import { ADMIN_KEY } from '../support/edge/constants.ts';
import { CHAT, call, errorCode, freshIsolate, goLive, makeMaskSet, newTenant } from './support/edge.ts';

/** Called directly: the test runtime's own door gets slower with every request. */
const isolate = freshIsolate();
let key: string;
beforeAll(async () => {
  const made = await newTenant();
  key = made.key;
  await goLive('compass', made.tenant);
});

const RUNS = { numRuns: 200, endOnFailure: true };
const json = fc.jsonValue({ maxDepth: 3 });

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

it('texts that are no JSON', async () => {
  await fc.assert(
    fc.asyncProperty(fc.uint8Array({ maxLength: 100 }), async (body) => {
      await expectReason(await call('POST', '/v1/route', { key, body }, isolate));
    }),
    RUNS,
  );
});

it('the admin API', async () => {
  const bodies = (valid: object) => fc.oneof(json, damaged(valid));
  const requests = fc.oneof(
    fc.tuple(fc.constant('/tenants'), bodies({ id: 'a', name: 'a', routing_policy: 'last_user' })),
    fc.tuple(fc.constant('/keys'), bodies({ kind: 'tenant', tenant: 'tenant-1', name: 'x' })),
    fc.tuple(fc.constant('/mask-sets'), bodies(makeMaskSet('fuzz'))),
    fc.tuple(fc.constant('/publications'), bodies({ version: `v_${'0'.repeat(24)}`, tenant: 'tenant-1' })),
    fc.tuple(fc.constant('/publications/rollback'), bodies({ tenant: 'tenant-1', expected_version: null })),
  );
  await fc.assert(
    fc.asyncProperty(requests, async ([path, body]) => {
      await expectReason(
        await call('POST', `/admin/v1${path}`, { key: ADMIN_KEY, body: JSON.stringify(body) }, isolate),
      );
    }),
    { ...RUNS, numRuns: 400 },
  );
});

it('queries and paths of the admin API', async () => {
  const paths = [
    '/keys?tenant=',
    '/mask-sets?tenant=',
    '/mask-sets/',
    '/publications?tenant=',
    '/publications/live?tenant=',
  ];
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(...paths), fc.string({ unit: 'grapheme' }), async (path, text) => {
      await expectReason(
        await call('GET', `/admin/v1${path}${encodeURIComponent(text)}`, { key: ADMIN_KEY }, isolate),
      );
    }),
    RUNS,
  );
});
