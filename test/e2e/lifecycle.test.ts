/** Starting and stopping: twice, on taken ports, killed half-way, with answers under way, with a dead backend. */
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import type { OpenAI } from 'openai';
import { afterAll, beforeAll, expect, onTestFailed, test, vi } from 'vitest';
import { type DevFile, lockHome } from '../../gpu-backend/dev/dev-home.ts';
import { DEFAULT_MODEL } from '../../gpu-backend/model/sources/resolve.ts';
import {
  BY_NPM,
  createTinyHome,
  DIRECT,
  type Run,
  removeHome,
  run,
  type Started,
  start,
  stop,
  TINY_CONTEXT_TOKENS,
} from './product.ts';

const LIMIT_ms = 180_000;

/*
 * One home through all that may happen to it. A start takes seconds, so each test goes on with what the one before left
 * running, and starts what it needs where nothing runs.
 */
let home: string;
/** All that were started, and may still run when a test failed. */
let runs: Run[];
let current: Started | undefined;
beforeAll(async () => {
  home = await createTinyHome();
  runs = [];
});
afterAll(async () => {
  for (const { process: child, ended } of runs) {
    child.kill('SIGTERM');
    await ended;
  }
  removeHome(home);
}, 60_000);

async function begin(env: Record<string, string> = {}, command = DIRECT): Promise<Started> {
  current = await start(home, env, command);
  runs.push(current);
  return current;
}
const running = async (): Promise<Started> => current ?? (await begin());
async function runningByNpm(): Promise<Started> {
  if (current !== undefined && current.process.spawnfile !== BY_NPM[0]) await end();
  return current ?? (await begin({}, BY_NPM));
}

/** Stops what runs, which must end well. */
async function end(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
  const product = current!;
  current = undefined;
  expect(await stop(product, signal)).toBe(0);
}
async function kill({ process: child, ended }: Run): Promise<void> {
  current = undefined;
  child.kill('SIGKILL');
  await ended;
}

const hello = (model: string) => ({
  model,
  messages: [{ role: 'user' as const, content: 'Hello!' }],
  max_completion_tokens: 4,
});
const portOf = (url: string): string => new URL(url).port;
const statusOf = async (url: string, key: string): Promise<number> => {
  const headers = { authorization: `Bearer ${key}`, 'cf-connecting-ip': '192.0.2.1' };
  return (await fetch(url, { headers })).status;
};

test(
  'a start is announced; a second one on the same home is refused',
  async () => {
    const product = await running();
    const { dev } = product;
    expect(Object.keys(dev).sort()).toEqual(
      ['adminKey', 'apiKey', 'backend', 'backendKey', 'edge', 'model'].sort(),
    );
    expect(statSync(path.join(home, 'dev.json')).mode & 0o777).toBe(0o600);
    expect(product.output()).toContain(`ready at ${dev.edge}`);
    expect(product.output()).toContain('curl -N');
    const log = readFileSync(path.join(home, 'logs/backend.log'), 'utf8');
    expect(log).toContain(`"threads":${process.env.MASKROUTE_THREADS}`);
    for (const url of [dev.edge, dev.backend]) expect((await fetch(`${url}/readyz`)).status).toBe(200);

    const second = run(home);
    expect(await second.ended).toBe(1);
    expect(second.output()).toMatch(/^error: Maskroute is already running on \S+\. .*MASKROUTE_HOME.*\n$/);
    expect(existsSync(path.join(home, 'dev.json'))).toBe(true);
  },
  LIMIT_ms,
);

/** The id of a process's child whose command line holds `entry`. */
function childOf(parent: number, entry: string): number {
  const children = readFileSync(`/proc/${parent}/task/${parent}/children`, 'utf8').trim().split(' ');
  return Number(children.find((pid) => readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(entry)));
}

test.runIf(process.platform === 'linux')(
  'a backend that dies is answered for with 503, and comes back',
  async () => {
    const product = await running();
    const { edge, apiKey, model } = product.dev;
    const ask = () =>
      fetch(`${edge}/v1/chat/completions`, {
        method: 'POST',
        headers: { authorization: `Bearer ${apiKey}`, 'content-type': 'application/json' },
        body: JSON.stringify(hello(model)),
      });
    expect((await ask()).status).toBe(200);
    process.kill(childOf(product.process.pid!, 'children.ts\0backend'), 'SIGKILL');
    const refused = await ask();
    expect(refused.status).toBe(503);
    expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
    expect(await refused.json()).toMatchObject({
      error: { code: 'backend_unreachable', type: 'server_error' },
    });
    await vi.waitFor(async () => expect((await ask()).status).toBe(200), { timeout: 30_000, interval: 200 });
    expect(product.output()).toMatch(/backend ended \(signal SIGKILL\)/);
  },
  LIMIT_ms,
);

const admin = async ({ edge, adminKey }: DevFile, method: string, route: string, body?: object) => {
  const response = await fetch(`${edge}/admin/v1${route}`, {
    method,
    headers: { authorization: `Bearer ${adminKey}`, 'content-type': 'application/json' },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  expect(response.ok, `${method} ${route}`).toBe(true);
  return (await response.json()) as { key: string; data: Record<string, number>[] };
};

/** What is known of a tenant's use after the next start. */
async function accountOf(dev: DevFile, tenant: string) {
  const [row] = (await admin(dev, 'GET', `/usage?tenant=${tenant}`)).data;
  const [budget] = (await admin(dev, 'GET', `/tenants/${tenant}/budget`)).data;
  return {
    requests: row?.requests ?? 0,
    tokens: (row?.prompt_tokens ?? 0) + (row?.completion_tokens ?? 0),
    used: budget?.used,
  };
}

async function limitedClient({ dev, client }: Started, tenant: string): Promise<OpenAI> {
  await admin(dev, 'POST', '/tenants', { id: tenant, name: tenant, tokens_per_day: 100_000 });
  const { key } = await admin(dev, 'POST', '/keys', { tenant, name: tenant });
  return client.withOptions({ apiKey: key });
}

async function answers(client: OpenAI, model: string, count: number): Promise<number> {
  let tokens = 0;
  for (let i = 0; i < count; i++) {
    const { usage } = await client.chat.completions.create(hello(model));
    tokens += usage!.total_tokens;
  }
  return tokens;
}

/** How many requests the engine works on. */
async function requestsOf({ backend, backendKey }: DevFile): Promise<number> {
  const headers = { authorization: `Bearer ${backendKey}` };
  const text = await (await fetch(`${backend}/metrics`, { headers })).text();
  return Number(/^num_requests_running(?:\{.*\})? (\d+)/m.exec(text)?.[1]);
}

/** Far more than anybody waits for, and less than the context takes. */
const ENDLESS_TOKENS = TINY_CONTEXT_TOKENS - 100;

test(
  'a stop lets an answer under way finish, leaves no dev.json, exits with 0 and loses no usage: not of one whose client hung up',
  async () => {
    const first = await running();
    const { edge, backend, ...kept } = first.dev;
    const { model } = kept;
    const client = await limitedClient(first, 'stopped');
    const tokens = await answers(client, model, 10);
    // No number of wrong keys keeps the next start from coming up.
    const tenants = `${edge}/admin/v1/tenants`;
    for (let i = 0; i < 150; i++) expect(await statusOf(tenants, `wrong-key-${i}`)).toBe(401);
    expect(await statusOf(tenants, kept.adminKey)).toBe(200);
    const abort = new AbortController();
    const endless = { ...hello(model), max_completion_tokens: ENDLESS_TOKENS, ignore_eos: true };
    const works = (count: number) =>
      vi.waitFor(async () => expect(await requestsOf(first.dev)).toBe(count), {
        timeout: 20_000,
        interval: 5,
      });
    await works(0);
    const left = client.chat.completions.create(endless, { signal: abort.signal });
    left.catch(() => {});
    await works(1);
    const stream = await first.client.chat.completions.create({
      ...hello(model),
      max_completion_tokens: 1000,
      ...{ ignore_eos: true },
      stream: true,
      stream_options: { include_usage: true },
    } as const);
    let streamed: number | undefined;
    let ended: Promise<void> | undefined;
    for await (const chunk of stream) {
      if (ended === undefined) abort.abort();
      ended ??= end('SIGINT');
      streamed = chunk.usage?.completion_tokens ?? streamed;
    }
    expect(streamed).toBe(1000);
    await ended;
    expect(existsSync(path.join(home, 'dev.json'))).toBe(false);
    for (const url of [edge, backend]) await expect(fetch(url)).rejects.toThrow();

    const second = await begin();
    expect(second.dev).toMatchObject(kept);
    expect((await second.client.chat.completions.create(hello(model))).choices).toHaveLength(1);
    const account = await accountOf(second.dev, 'stopped');
    expect(account.requests).toBe(11);
    expect(account.used).toBe(account.tokens);
    expect(account.tokens).toBeGreaterThan(tokens);
    expect(account.tokens).toBeLessThan(tokens + ENDLESS_TOKENS);
  },
  LIMIT_ms,
);

/** Longer than usage may be on its way on one machine. */
const COUNTED_WITHIN_ms = 3_000;

test.runIf(process.platform === 'linux')(
  'a kill of everything loses the usage of the last seconds at most, no budget and no change of a tenant',
  async () => {
    const first = await running();
    await admin(first.dev, 'PATCH', '/tenants/local', { enabled: false });
    const client = await limitedClient(first, 'killed');
    const tokens = await answers(client, first.dev.model, 10);
    await vi.waitFor(
      async () => expect(await accountOf(first.dev, 'killed')).toMatchObject({ requests: 10 }),
      COUNTED_WITHIN_ms,
    );
    for (const pid of treeOf(first.process.pid!)) process.kill(pid, 'SIGKILL');
    await kill(first);

    const second = await begin();
    expect(await accountOf(second.dev, 'killed')).toMatchObject({ requests: 10, tokens, used: tokens });
    // Who disabled the tenant of this machine can start it again, and enable it.
    const asked = second.client.chat.completions.create(hello(second.dev.model));
    await expect(asked).rejects.toMatchObject({ code: 'tenant_disabled' });
    await admin(second.dev, 'PATCH', '/tenants/local', { enabled: true });
  },
  LIMIT_ms,
);

/** A process and all that it started. */
function treeOf(pid: number): number[] {
  const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ');
  return [pid, ...children.filter((child) => child !== '').flatMap((child) => treeOf(Number(child)))];
}

test(
  'killed when ready and killed half-way: the next start works, on the same ports',
  async () => {
    const ready = await running();
    await kill(ready);
    const env = { PORT: portOf(ready.dev.edge), BACKEND_PORT: portOf(ready.dev.backend) };
    const log = path.join(home, 'logs/backend.log');
    rmSync(log);
    const halfWay = run(home, env);
    runs.push(halfWay);
    await vi.waitFor(() => expect(existsSync(log)).toBe(true), 20_000);
    await kill(halfWay);
    expect(halfWay.output()).not.toContain('is ready at');
    const next = await begin(env, BY_NPM);
    expect(next.dev).toEqual(ready.dev);
    expect((await next.client.chat.completions.create(hello(next.dev.model))).choices).toHaveLength(1);
  },
  LIMIT_ms,
);

test(
  'a database that is deleted is missed at once and at the next start, and comes back from its copy',
  async () => {
    const tenants = async ({ edge, adminKey }: DevFile) => {
      const headers = { authorization: `Bearer ${adminKey}` };
      const answer = await fetch(`${edge}/admin/v1/tenants`, { headers });
      return ((await answer.json()) as { data: { id: string }[] }).data.map(({ id }) => id);
    };
    // The test before this one left it.
    const first = await runningByNpm();
    const before = await tenants(first.dev);
    // Made before this start, which copied it.
    expect(before).toContain('killed');
    rmSync(path.join(home, 'edge'), { recursive: true });
    await vi.waitFor(() => expect(first.output()).toMatch(/database was deleted or replaced while/), 10_000);
    // Nothing hangs: what does not need the file goes on, and it stops as ever.
    expect((await fetch(`${first.dev.edge}/healthz`)).status).toBe(200);
    await end();
    // npm is told, and what it started ends with it.
    for (const url of [first.dev.edge, first.dev.backend]) await expect(fetch(url)).rejects.toThrow();

    const empty = await begin();
    expect(empty.output()).toMatch(/local database is gone from .*begins with an empty one/s);
    const [, option] = /npm start -- (--restore=\S+)/.exec(empty.output())!;
    expect(await tenants(empty.dev)).toEqual(['local']);
    await end();

    const restored = await begin({}, [...BY_NPM, '--', option!]);
    expect(await tenants(restored.dev)).toEqual(before);
    expect(restored.output()).not.toContain('is gone');
    const { model } = restored.dev;
    expect((await restored.client.chat.completions.create(hello(model))).choices).toHaveLength(1);
  },
  LIMIT_ms,
);

test('a database that is locked or damaged stops a start, which says what to do', async () => {
  const damaged = await createTinyHome();
  const folder = path.join(damaged, 'edge/d1/miniflare-D1DatabaseObject');
  mkdirSync(folder, { recursive: true });
  const file = path.join(folder, `${'0'.repeat(64)}.sqlite`);
  const lock = new DatabaseSync(file);
  lock.exec('BEGIN EXCLUSIVE');
  const waits = run(damaged);
  expect(await waits.ended).toBe(1);
  expect(waits.output()).toMatch(/\.sqlite: database is locked\)\.\nAnother program .*\n$/);
  lock.close();
  writeFileSync(file, 'no database'.repeat(1000));
  const refused = run(damaged);
  expect(await refused.ended).toBe(1);
  expect(refused.output()).toMatch(
    /^error: The local database cannot be read \(\S+\.sqlite: file is not a database\)\.\nThere is no copy .*\nTo begin .*\n$/,
  );
  removeHome(damaged);
});

test.each([
  ['tokenizer.json', "The model's tokenizer cannot be opened: "],
  ['weights.bin', 'The engine did not start: '],
])('a model whose %s is damaged stops a start, which says how to find out', async (file, reason) => {
  const damaged = await createTinyHome();
  writeFileSync(path.join(damaged, 'models', DEFAULT_MODEL, file), '{');
  const refused = run(damaged);
  expect(await refused.ended).toBe(1);
  expect(refused.output()).toContain(`error: ${reason}`);
  expect(refused.output()).toMatch(/\nTo check .*: maskroute model show \S+ --verify\n$/);
  removeHome(damaged);
});

test(
  'what `npm start` started ends with npm when that is killed, too',
  async () => {
    const killed = await runningByNpm();
    current = undefined;
    if (process.platform === 'linux') {
      const [, product] = treeOf(killed.process.pid!);
      onTestFailed(() => void process.kill(product!));
    }
    killed.process.kill('SIGKILL');
    // What npm started has its output open, so `ended` waits for that, too.
    await once(killed.process, 'exit');
    await vi.waitFor(() => expect(existsSync(path.join(home, 'dev.json'))).toBe(false), 10_000);
    // It still counts what it knows, and keeps its home until that is done.
    const unlock = await vi.waitFor(() => lockHome(home), { timeout: 60_000, interval: 200 });
    unlock();
    for (const url of [killed.dev.edge, killed.dev.backend]) await expect(fetch(url)).rejects.toThrow();
  },
  LIMIT_ms,
);

test('a taken port and a wrong one are named', async () => {
  const empty = await createTinyHome();
  const other = createServer().listen(0, '127.0.0.1');
  await once(other, 'listening');
  const { port } = other.address() as AddressInfo;
  const taken = run(empty, { PORT: String(port) });
  expect(await taken.ended).toBe(1);
  expect(taken.output()).toMatch(new RegExp(`^error: Port ${port} is in use .*PORT.*\\n$`));
  other.close();
  const wrong = run(empty, { BACKEND_PORT: '80808' });
  expect(await wrong.ended).toBe(2);
  expect(wrong.output()).toMatch(/^error: BACKEND_PORT must be a port .*\n$/);
  const same = run(empty, { PORT: String(port), BACKEND_PORT: String(port) });
  expect(await same.ended).toBe(2);
  expect(same.output()).toMatch(/^error: PORT and BACKEND_PORT are both .*\n$/);
  removeHome(empty);
});
