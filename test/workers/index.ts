/** The worker through the runtime's own door, as Cloudflare calls it. */
import { exports } from 'cloudflare:workers';
import { expect, it } from 'vitest';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { admin, call, chat, goLive, newTenant, recorded, soon } from './support/edge.ts';
import { budgetOf, limitedTenant } from './support/limits.ts';

const door = (request: Request): Promise<Response> => exports.default.fetch(request);

it('answers whole and streamed, under the mask that is live, and counts both', async () => {
  const { tenant, key } = await newTenant();
  const { version } = await goLive('compass', tenant);
  const whole = await chat(key, {}, door);
  expect(await whole.json()).toMatchObject({ object: 'chat.completion' });
  const streamed = await chat(key, { stream: true }, door);
  expect(await streamed.text()).toMatch(/data: \[DONE\]\n\n$/);
  for (const response of [whole, streamed]) expect(response.headers.get(HEADERS.version)).toBe(version);
  await soon(async () => {
    const { data } = await (await admin('GET', `/usage?tenant=${tenant}`)).json<{ data: object[] }>();
    expect(data).toMatchObject([{ requests: 2 }]);
  });
});

it('charges the budget of a tenant, and hears of a client that hangs up', async () => {
  const { tenant, key } = await limitedTenant({ tokens_per_day: 10_000 });
  const response = await chat(key, { stream: true, user: 'stream-forever' }, door);
  const reader = response.body!.getReader();
  await reader.read();
  await reader.cancel();
  const id = response.headers.get(HEADERS.requestId)!;
  await soon(async () => expect((await recorded(id))!.hungUp).toBe(true));
  await soon(async () => expect((await budgetOf(tenant))['tokens/day']).toBeGreaterThan(0));
});

it('refuses a body that is no JSON, and who has no key', async () => {
  const { key } = await newTenant();
  expect((await call('POST', '/v1/chat/completions', { key, body: '{' }, door)).status).toBe(400);
  expect((await call('GET', '/v1/models', {}, door)).status).toBe(401);
  expect((await call('GET', '/healthz', {}, door)).status).toBe(200);
});
