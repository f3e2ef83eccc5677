/**
 * The edge's signed tokens at the real server: whose clock may be how far off, what was used before, and what
 * somebody changed. The edge's own code signs; only the clock that it reads is set.
 */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createAuthenticator } from '../../../gpu-backend/api/auth.ts';
import {
  createVerifier,
  importTokenKey,
  signToken,
  TOKEN_LIFETIME_s,
  TOKEN_PREFIX,
  TOKEN_SKEW_s,
} from '../../../shared/wire/service-token.ts';
import { AUDIENCE, BACKEND_KEY, serveModel, type TestServer } from './harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from './scripted-engine.ts';

let server: TestServer;
const engine = scriptedEngine({ answer: () => bytesOf('abc') });
beforeAll(async () => {
  server = await serveModel(scriptedModel(engine));
});
afterAll(() => server[Symbol.asyncDispose]());

/** Signed by an edge whose clock is `ahead_s` ahead of the backend's. */
async function sign(change: object = {}, ahead_s = 0, key = BACKEND_KEY): Promise<string> {
  const issuedAt_s = Math.floor(Date.now() / 1000) + ahead_s;
  const expiresAt_s = issuedAt_s + TOKEN_LIFETIME_s;
  const nonce = randomUUID();
  const claims = { tenant: 'acme', issuedAt_s, expiresAt_s, nonce, edge: '', audience: AUDIENCE, ...change };
  return await signToken(await importTokenKey(key), claims);
}

async function use(token: string): Promise<{ status: number; code?: string; message?: string }> {
  const response = await fetch(`${server.url}/v1/models`, { headers: { authorization: `Bearer ${token}` } });
  const { error } = (await response.json()) as { error?: { code: string; message: string } };
  return { status: response.status, ...error };
}
const refused = { status: 401, code: 'invalid_api_key' };

it('carries whatever text it is given', async () => {
  const key = await importTokenKey(BACKEND_KEY);
  const verify = createVerifier([BACKEND_KEY], 'backend');
  const now_s = Math.floor(Date.now() / 1000);
  const times = { issuedAt_s: now_s, expiresAt_s: now_s + TOKEN_LIFETIME_s };
  for (const tenant of ['acme', '', 'Größe', '中文 🙂 \ud800', '\u007f\u0080\u00ff"\\\n', '?>~']) {
    const claims = { tenant, ...times, nonce: randomUUID(), edge: 'http://bücher.example' };
    const token = await signToken(key, claims);
    expect(token).toMatch(/^eyJ[\w-]+\.[\w-]+\.[\w-]{43}$/);
    expect(await verify(token, now_s)).toEqual(claims);
  }
});

describe('the clocks of edge and backend', () => {
  // A second passes between signing and reading, so the very border is not asked.
  it.each([0, TOKEN_SKEW_s, -TOKEN_SKEW_s, -(TOKEN_LIFETIME_s + TOKEN_SKEW_s - 2)])(
    'may differ by %i s',
    async (ahead_s) => {
      expect(await use(await sign({}, ahead_s))).toMatchObject({ status: 200 });
    },
  );

  it.each([
    [TOKEN_SKEW_s + 5, /issued 3[345] s in the future by this backend's clock/],
    [3600, /issued (3600|3599) s in the future/],
    [-(TOKEN_LIFETIME_s + TOKEN_SKEW_s + 1), /ended 3[12] s ago by this backend's clock/],
    [-86_400, /ended 8634[01] s ago/],
  ])('may not differ by %i s, and the answer names them', async (ahead_s, message) => {
    const answer = await use(await sign({}, ahead_s));
    expect(answer).toMatchObject({ status: 401, code: 'expired_token' });
    expect(answer.message).toMatch(message);
    expect(answer.message).toContain('the clocks of edge and backend');
  });

  it('do not make a token live longer than it may', async () => {
    const now_s = Math.floor(Date.now() / 1000);
    const long = { issuedAt_s: now_s, expiresAt_s: now_s + TOKEN_LIFETIME_s + 1 };
    expect(await use(await sign(long))).toMatchObject(refused);
  });
});

describe('a token', () => {
  it('opens once', async () => {
    const token = await sign();
    expect(await use(token)).toMatchObject({ status: 200 });
    expect(await use(token)).toMatchObject(refused);
  });

  it('opens once, however its spelling is changed', async () => {
    const token = await sign();
    expect(await use(token)).toMatchObject({ status: 200 });
    // The last character of a signature has two bits that mean nothing, and base64 has two alphabets.
    const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_';
    const last = alphabet.indexOf(token.at(-1)!);
    const respelt = [alphabet[last ^ 1]!, alphabet[last ^ 2]!].map((char) => token.slice(0, -1) + char);
    const dot = token.lastIndexOf('.');
    respelt.push(`${token.slice(0, dot)}${token.slice(dot).replaceAll('-', '+').replaceAll('_', '/')}`);
    respelt.push(`${token}=`);
    for (const spelling of respelt) expect(await use(spelling)).toMatchObject(refused);
  });

  it('opens one backend', async () => {
    expect(await use(await sign({ audience: 'https://another.test' }))).toMatchObject(refused);
    expect(await use(await sign({ audience: undefined }))).toMatchObject(refused);
    expect(await use(await sign({ audience: `${AUDIENCE}.evil.test` }))).toMatchObject(refused);
  });

  it('of a backend, for an edge, opens no backend: not even one that does not know its own address', async () => {
    expect(await use(await sign({ scope: 'masks' }))).toMatchObject(refused);
    expect(await use(await sign({ scope: 'anything else' }))).toMatchObject(refused);
    const anywhere = createAuthenticator(BACKEND_KEY);
    await expect(anywhere(`Bearer ${await sign({ scope: 'masks' })}`)).rejects.toMatchObject({
      code: 'invalid_api_key',
    });
    expect(await anywhere(`Bearer ${await sign({ audience: undefined })}`)).toMatchObject({ tenant: 'acme' });
  });

  it('for an address that is known only once the backend listens is held to it', async () => {
    const address = Promise.withResolvers<string>();
    const own = createAuthenticator(BACKEND_KEY, { audience: address.promise });
    const answers = Promise.allSettled([
      own(`Bearer ${await sign()}`),
      own(`Bearer ${await sign({ audience: 'http://a' })}`),
    ]);
    address.resolve(`${AUDIENCE}/`);
    expect((await answers).map(({ status }) => status)).toEqual(['fulfilled', 'rejected']);
  });

  it('of another key, or for another tenant than was signed, opens nothing', async () => {
    expect(await use(await sign({}, 0, 'another-backend-key-0123456789'))).toMatchObject(refused);
    const [, payload, signature] = (await sign()).split('.') as [string, string, string];
    const claims = JSON.parse(Buffer.from(payload, 'base64url').toString());
    const changed = Buffer.from(JSON.stringify({ ...claims, tenant: 'other' })).toString('base64url');
    expect(await use(`${TOKEN_PREFIX}${changed}.${signature}`)).toMatchObject(refused);
    // The token that was caught is still good: the forgery did not use it up.
    expect(await use(`${TOKEN_PREFIX}${payload}.${signature}`)).toMatchObject({ status: 200 });
  });

  it('is signed in one way, and none can be talked into another', async () => {
    const [head, payload, signature] = (await sign()).split('.') as [string, string, string];
    const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');
    const unsigned = part({ alg: 'none', typ: 'JWT' });
    for (const forged of [
      `${head}.${payload}.`,
      `${head}.${payload}`,
      `${head}..${signature}`,
      `${head}.${payload}.${signature}.${signature}`,
      `${unsigned}.${payload}.`,
      `${unsigned}.${payload}.${signature}`,
      `${part({ alg: 'HS512', typ: 'JWT' })}.${payload}.${signature}`,
      `${part({ typ: 'JWT', alg: 'HS256' })}.${payload}.${signature}`,
      `${head.toLowerCase()}.${payload}.${signature}`,
      // Signed rightly, but with claims that no edge signs.
      await sign({ alg: 'none' }),
      await sign({ scope: 'everything' }),
      await sign({ nonce: 'short' }),
      await sign({ issuedAt_s: 'now' }),
      await sign({ tenant: { admin: true } }),
    ]) {
      expect(await use(forged), forged.slice(0, 20)).toMatchObject(refused);
    }
  });

  it('that is cut anywhere, or has one character changed, opens nothing', async () => {
    const token = await sign();
    for (let length = 0; length < token.length; length += 7) {
      expect((await use(token.slice(0, length))).status, `cut to ${length}`).toBe(401);
    }
    for (let at = 0; at < token.length - 1; at += 5) {
      const other = token[at] === 'x' ? 'y' : 'x';
      const changed = token.slice(0, at) + other + token.slice(at + 1);
      expect((await use(changed)).status, `character ${at}`).toBe(401);
    }
    expect((await use(token)).status).toBe(200);
  });

  it('of any length is refused without a fault', async () => {
    expect(await use(TOKEN_PREFIX + 'A'.repeat(6000))).toMatchObject(refused);
    expect(server.logs()).not.toContain('"level":50');
  });
});
