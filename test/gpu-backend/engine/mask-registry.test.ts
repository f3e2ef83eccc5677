/** Masks by id, against a real HTTP edge that can be slow, wrong, or gone. */
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { createMaskRegistry } from '../../../gpu-backend/engine/mask-registry.ts';
import type { MaskId, ModelHash } from '../../../shared/mask/mask.ts';
import { DENSE_MASK_ID, maskBits, maskFromSkippedLayers, maskId } from '../../../shared/mask/mask.ts';
import type { MaskRecord } from '../../../shared/wire/protocol.ts';
import { createVerifier } from '../../../shared/wire/service-token.ts';

const MODEL = { hash: 'cd'.repeat(32) as ModelHash, blockCount: 12 };
const OTHER = 'ef'.repeat(32) as ModelHash;
const mask = maskFromSkippedLayers(12, { skipAttention: [2], skipFfn: [0, 5] });
const ID = maskId(MODEL.hash, mask);
const recordOf = (hash: ModelHash, of = mask): MaskRecord => ({
  id: maskId(hash, of),
  modelHash: hash,
  blockCount: of.runs.length,
  bits: maskBits(of),
});

let folder: string;
let asked: { path: string; authorization: string | undefined }[];
let answer: (request: IncomingMessage, response: ServerResponse) => void;
let edge: string;
const server = createServer((request, response) => {
  asked.push({ path: request.url!, authorization: request.headers.authorization });
  answer(request, response);
});

const records: Record<string, MaskRecord> = { [ID]: recordOf(MODEL.hash) };
const knows = (_: IncomingMessage, response: ServerResponse) => {
  const record = records[_.url!.split('/').at(-1)!];
  response.statusCode = record === undefined ? 404 : 200;
  response.end(JSON.stringify(record ?? {}));
};

beforeEach(async () => {
  folder = join(await mkdtemp(join(tmpdir(), 'maskroute-masks-')), 'masks');
  asked = [];
  answer = knows;
  if (!server.listening) await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  edge = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterEach(async () => {
  await rm(join(folder, '..'), { recursive: true, force: true });
  server.closeAllConnections();
  await new Promise((resolve) => server.close(resolve));
});

const WAITS = { fetch_ms: 10_000, unknown_ms: 5_000, unreachable_ms: 300 };
const registry = (edgeUrl: string | null = edge, warn: (message: string) => void = () => {}, waits = WAITS) =>
  createMaskRegistry({ folder, model: MODEL, backendKey: 'key', edgeUrl: edgeUrl ?? undefined, warn, waits });

describe('mask registry', () => {
  it('knows dense without asking', async () => {
    const dense = await registry().resolve(DENSE_MASK_ID, undefined);
    expect([...dense.runs]).toEqual(Array(12).fill(1));
    expect(asked).toEqual([]);
  });

  it('asks the edge once, however many ask for the mask, and keeps it on disk', async () => {
    const masks = registry();
    const found = await Promise.all(Array.from({ length: 20 }, () => masks.resolve(ID, undefined)));
    expect(found.every(({ runs }) => Buffer.compare(runs, mask.runs) === 0)).toBe(true);
    expect(asked.map(({ path }) => path)).toEqual([`/internal/v1/masks/${ID}`]);
    expect(await readdir(folder)).toEqual([`${ID}.json`]);
    answer = (_, response) => response.destroy();
    expect(await registry().resolve(ID, undefined)).toEqual(mask);
    expect(asked.length).toBe(1);
  });

  it('lets all that wait for a mask go on in a turn of the event loop each', async () => {
    const masks = registry();
    let turn = 0;
    let ended = 0;
    const count = () => {
      turn++;
      if (ended < 20) setImmediate(count);
    };
    setImmediate(count);
    const turns = await Promise.all(
      Array.from({ length: 20 }, async () => {
        await masks.resolve(ID, undefined);
        ended++;
        return turn;
      }),
    );
    expect(new Set(turns).size).toBe(20);
  });

  it('shows the edge a token for that edge and for masks, and nobody the key', async () => {
    await registry().resolve(ID, undefined);
    const token = asked[0]!.authorization!.replace('Bearer ', '');
    expect(token).not.toContain('key');
    const claims = await createVerifier(['key'], 'edge')(token, Date.now() / 1000);
    expect(claims).toMatchObject({ tenant: '', edge: '', audience: edge, scope: 'masks' });
    expect(claims.expiresAt_s - claims.issuedAt_s).toBeLessThanOrEqual(60);
  });

  it('asks at the configured address with a token for the edge of the name that the caller’s token says', async () => {
    const name = 'https://edge.example.com';
    expect(await registry(edge).resolve(ID, name)).toEqual(mask);
    const token = asked[0]!.authorization!.replace('Bearer ', '');
    const claims = await createVerifier(['key'], 'edge')(token, Date.now() / 1000);
    expect(claims.audience).toBe(name);
  });

  it('asks the edge that the token names, unless one is configured', async () => {
    expect(await registry(null).resolve(ID, edge)).toEqual(mask);
    await expect(
      registry('http://127.0.0.1:9').resolve('m_0'.padEnd(26, '0') as MaskId, edge),
    ).rejects.toMatchObject({
      code: 'configuration_unavailable',
    });
    expect(asked.length).toBe(1);
  });

  it('says unknown_mask when there is nobody to ask, or the edge does not have it, and not too often', async () => {
    const id = 'm_ffffffffffffffffffffffff' as MaskId;
    const warnings: string[] = [];
    await expect(
      registry(null, (message) => warnings.push(message)).resolve(id, undefined),
    ).rejects.toMatchObject({
      code: 'unknown_mask',
      message: expect.stringContaining('no address of the edge is configured'),
    });
    expect(warnings).toEqual(['a mask could not be fetched']);
    const masks = registry();
    for (let time = 0; time < 5; time++) {
      await expect(masks.resolve(id, undefined)).rejects.toMatchObject({
        code: 'unknown_mask',
        param: 'mask',
      });
    }
    expect(asked.length).toBe(1);
  });

  it.each([
    ['another model', recordOf(OTHER)],
    [
      'another number of blocks',
      recordOf(MODEL.hash, maskFromSkippedLayers(14, { skipAttention: [2], skipFfn: [] })),
    ],
  ])('refuses a mask that exists for %s', async (_, record) => {
    records[record.id] = record;
    for (let time = 0; time < 2; time++) {
      await expect(registry().resolve(record.id as MaskId, undefined)).rejects.toMatchObject({
        code: 'mask_model_mismatch',
      });
    }
    expect(asked.length).toBe(1);
  });

  it.each<[string, (response: ServerResponse) => void]>([
    ['another mask', (response) => response.end(JSON.stringify(recordOf(OTHER)))],
    [
      'bits that do not fit the id',
      (response) => response.end(JSON.stringify({ ...recordOf(MODEL.hash), bits: 'fff' })),
    ],
    ['no JSON', (response) => response.end('<html>')],
    ['an endless answer', (response) => void response.write('x'.repeat(100_000))],
    ['a redirect', (response) => response.writeHead(302, { location: 'http://127.0.0.1:1/' }).end()],
    ['a refusal', (response) => response.writeHead(401).end()],
    ['nothing', (response) => void response.destroy()],
  ])('trusts no edge that answers %s', async (_, reply) => {
    answer = (__, response) => reply(response);
    const warnings: string[] = [];
    await expect(
      registry(edge, (message) => warnings.push(message)).resolve(ID, undefined),
    ).rejects.toMatchObject({
      code: 'configuration_unavailable',
      retryAfter_s: 1,
    });
    expect(warnings).toEqual(['a mask could not be fetched']);
    expect(await readdir(folder).catch(() => [])).toEqual([]);
  });

  it('gives up on a stalled edge, and asks again later', async () => {
    answer = () => {};
    const masks = registry(edge, undefined, { ...WAITS, fetch_ms: 200 });
    // The edge is silent for ever.
    await expect(masks.resolve(ID, undefined)).rejects.toMatchObject({ code: 'configuration_unavailable' });
    answer = knows;
    await vi.waitFor(async () => expect(await masks.resolve(ID, undefined)).toEqual(mask), 20_000);
  });

  it('replaces a damaged file', async () => {
    await registry().resolve(ID, undefined);
    const path = join(folder, `${ID}.json`);
    const whole = await readFile(path, 'utf8');
    for (const damage of [whole.slice(0, 40), whole.replace('"bits":"', '"bits":"0'), '']) {
      await writeFile(path, damage);
      const warnings: string[] = [];
      expect(await registry(edge, (message) => warnings.push(message)).resolve(ID, undefined)).toEqual(mask);
      expect(warnings).toEqual(['a stored mask is damaged; fetching it again']);
      expect(await readFile(path, 'utf8')).toBe(whole);
    }
  });

  it('works without a place to keep masks', async () => {
    await writeFile(folder, 'a file where the folder should be');
    const warnings: string[] = [];
    expect(await registry(edge, (message) => warnings.push(message)).resolve(ID, undefined)).toEqual(mask);
    expect(warnings).toEqual(['a mask could not be stored on disk']);
  });
});
