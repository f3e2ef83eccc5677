/** Versions that go live later, step by step, or not at all. */
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { LivePublication, Publication } from '../../../shared/admin/publication-wire.ts';
import {
  activate,
  admin,
  badD1,
  CHAT,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  later,
  makeMaskSet,
  newTenant,
  say,
  upload,
} from '../support/edge.ts';

type Fetch = ReturnType<typeof freshIsolate>;

afterEach(() => void vi.useRealTimers());

const versionSeen = async (key: string, text = 'north', fetch?: Fetch) => {
  const response = await chat(key, say(text), fetch);
  expect(response.status).toBe(200);
  return response.headers.get('x-maskroute-version');
};
const live = async (tenant: string) =>
  await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<LivePublication>();
const inFuture = (after_ms: number) => new Date(Date.now() + after_ms).toISOString();

async function twoVersions() {
  const { tenant, key } = await newTenant();
  const { version: old } = await goLive('old', tenant);
  const { version: fresh } = await upload(makeMaskSet('new'), tenant);
  return { tenant, key, old, fresh };
}

describe('a scheduled publication', () => {
  it('goes live at its time in every isolate, also in one that cannot reach D1 by then', async () => {
    const { tenant, key, old, fresh } = await twoVersions();
    const d1 = badD1();
    const cutOff = freshIsolate({ DB: d1.DB });
    const at_ms = Date.now() + 2_500;
    const activate_at = new Date(at_ms).toISOString();
    expect(await activate(fresh, { tenant, activate_at })).toMatchObject({ activate_at });
    expect(await live(tenant)).toMatchObject({ version: fresh, share: 0, base_version: old });
    expect(await versionSeen(key)).toBe(old);
    expect(await versionSeen(key, 'north', cutOff)).toBe(old);
    d1.be('failing');
    await vi.waitFor(async () => expect(await versionSeen(key, 'north', cutOff)).toBe(fresh), {
      timeout: 12_000,
    });
    expect(Date.now()).toBeGreaterThanOrEqual(at_ms);
    expect(Date.now() - at_ms).toBeLessThan(8_000);
    expect(await versionSeen(key)).toBe(fresh);
    expect(await live(tenant)).toMatchObject({ version: fresh, share: 1, base_version: null });
  });

  it('for a time that is over is live at once: a script that is late goes on', async () => {
    const { tenant, fresh } = await twoVersions();
    const activated = await activate(fresh, { tenant, activate_at: inFuture(-3_600_000) });
    expect(activated.activate_at).toBe(activated.created_at);
    expect(await live(tenant)).toMatchObject({ version: fresh, share: 1, base_version: null });
  });

  it('that is the first can be called off: nothing is live then, and the history says so', async () => {
    const { tenant, key } = await newTenant();
    const { version } = await upload(makeMaskSet('first'), tenant);
    const other = freshIsolate();
    for (const schedule of [
      { activate_at: inFuture(3_600_000) },
      { rollout: [{ share: 0.999, duration_s: 3_600 }] },
    ]) {
      await activate(version, { tenant, ...schedule });
      const wrong = admin('POST', '/publications/rollback', { tenant, expected_version: null });
      expect(await errorCode(wrong)).toBe('409 conflict');
      const body = { tenant, expected_version: version };
      const off = await created<Publication>(admin('POST', '/publications/rollback', body));
      expect(off).toMatchObject({ action: 'rollback', version: null, replaced_version: version });
      expect(await errorCode(admin('GET', `/publications/live?tenant=${tenant}`))).toBe('404 not_found');
      expect(await errorCode(admin('POST', '/publications/rollback', { tenant }))).toBe('409 conflict');
      for (const fetch of [undefined, other]) {
        expect((await chat(key, {}, fetch)).headers.get('x-maskroute-fallback')).toBe('no_mask_set');
      }
    }
    const list = await admin('GET', `/publications?tenant=${tenant}`);
    const { data } = await list.json<{ data: Publication[] }>();
    expect(data.map((entry) => entry.version)).toEqual([null, version, null, version]);
    // The way is open for the next one, and back from there is its own matter.
    await activate(version, { tenant, expected_version: null });
    expect(await versionSeen(key)).toBe(version);
    expect(await errorCode(admin('POST', '/publications/rollback', { tenant }))).toBe('409 conflict');
  });

  it('that is the first is called off once, whoever is faster', async () => {
    const { tenant } = await newTenant();
    const { version } = await upload(makeMaskSet('first'), tenant);
    await activate(version, { tenant, activate_at: inFuture(3_600_000) });
    const body = { tenant, expected_version: version };
    const both = await Promise.all([1, 2].map(() => admin('POST', '/publications/rollback', body)));
    expect(both.map(({ status }) => status).sort()).toEqual([201, 409]);
  });

  it('is called off by a rollback, and passed over by the next publication', async () => {
    const { tenant, key, old, fresh } = await twoVersions();
    await activate(fresh, { tenant, activate_at: inFuture(3_600_000) });
    const back = await created<Publication>(admin('POST', '/publications/rollback', { tenant }));
    expect(back).toMatchObject({ version: old, replaced_version: fresh });
    expect(await live(tenant)).toMatchObject({ version: old, share: 1 });

    await activate(fresh, { tenant, activate_at: inFuture(3_600_000) });
    const { version: third } = await upload(makeMaskSet('third'), tenant);
    await activate(third, { tenant, activate_at: inFuture(3_600_000) });
    expect(await live(tenant)).toMatchObject({ version: third, base_version: old });
    expect(await versionSeen(key)).toBe(old);
    await activate(third, { tenant });
    expect(await versionSeen(key)).toBe(third);
    await created(admin('POST', '/publications/rollback', { tenant }));
    expect(await versionSeen(key)).toBe(old);
  });

  it('of a tenant that had none leaves it with the default set until then, or when it is called off', async () => {
    const { version: shared } = await goLive('shared');
    const { tenant, key } = await newTenant();
    const { version } = await upload(makeMaskSet('own'), tenant);
    await activate(version, { tenant, activate_at: inFuture(3_600_000) });
    expect(await versionSeen(key)).toBe(shared);
    await created(admin('POST', '/publications/rollback', { tenant }));
    expect(await versionSeen(key)).toBe(shared);
  });
});

describe('a gradual publication', () => {
  it('is seen by its share of conversations, which keep it, and by all of them at the end', async () => {
    const { tenant, key, old, fresh } = await twoVersions();
    const rollout = [
      { share: 0.3, duration_s: 120 },
      { share: 0.7, duration_s: 3600 },
    ];
    await activate(fresh, { tenant, rollout });
    expect(await live(tenant)).toMatchObject({ rollout, share: 0.3, base_version: old });
    const texts = Array.from({ length: 120 }, (_, i) => `north ${i}`);
    const other = freshIsolate();
    // A dry run decides as a completion does, and keeps no backend busy.
    const seenBy = async (fetch?: Fetch) =>
      await Promise.all(
        texts.map(async (text) => {
          const response = await call('POST', '/v1/route', { key, body: { ...CHAT, ...say(text) } }, fetch);
          expect(response.status).toBe(200);
          return response.headers.get('x-maskroute-version');
        }),
      );
    const first = await seenBy();
    const share = (seen: unknown[]) => seen.filter((version) => version === fresh).length / seen.length;
    expect(new Set(first)).toEqual(new Set([old, fresh]));
    expect(share(first)).toBeGreaterThan(0.15);
    expect(share(first)).toBeLessThan(0.45);
    // The next turn of a conversation sees what the first one saw.
    const messages = [
      { role: 'user', content: texts[0] },
      { role: 'assistant', content: 'yes' },
      { role: 'user', content: 'south?' },
    ];
    expect((await chat(key, { messages })).headers.get('x-maskroute-version')).toBe(first[0]);
    expect(await seenBy(other)).toEqual(first);
    later(121_000);
    expect((await live(tenant)).share).toBe(0.7);
    const second = await seenBy(other);
    expect(share(second)).toBeGreaterThan(0.55);
    first.forEach((version, i) => {
      if (version === fresh) expect(second[i]).toBe(fresh);
    });
    // Publishing the same version without steps finishes it.
    await activate(fresh, { tenant });
    expect(new Set(await seenBy())).toEqual(new Set([fresh]));
  });

  it('stands still while it is paused, for the same conversations, and goes on from there', async () => {
    const { tenant, key, old, fresh } = await twoVersions();
    const rollout = [{ share: 0.5, duration_s: 3600 }];
    await activate(fresh, { tenant, rollout });
    const texts = Array.from({ length: 30 }, (_, i) => `north ${i}`);
    const seen = () => Promise.all(texts.map((text) => versionSeen(key, text)));
    const first = await seen();
    const hold = (what: string) =>
      admin('POST', `/publications/${what}`, { tenant, expected_version: fresh });
    await created(hold('pause'));
    expect(await errorCode(hold('pause'))).toBe('409 conflict');
    expect(await live(tenant)).toMatchObject({
      share: 0.5,
      next_step_at: null,
      paused_at: expect.any(String),
    });
    const { data } = await (await admin('GET', `/publications?tenant=${tenant}`)).json<{
      data: Publication[];
    }>();
    expect(data.slice(0, 2).map(({ action }) => action)).toEqual(['pause', 'activate']);
    expect(await seen()).toEqual(first);
    // Long after its step would have been over.
    later(7_200_000);
    expect(await live(tenant)).toMatchObject({ share: 0.5, base_version: old });
    await created(hold('resume'));
    expect(await errorCode(hold('resume'))).toBe('409 conflict');
    expect(await live(tenant)).toMatchObject({ share: 0.5, paused_at: null });
    later(3_700_000);
    expect(await live(tenant)).toMatchObject({ share: 1 });
    // Everyone sees it: there is nothing to stop any more.
    expect(await errorCode(hold('pause'))).toBe('409 conflict');
    // A rollback goes to what was seen before all of it.
    expect(await created<Publication>(admin('POST', '/publications/rollback', { tenant }))).toMatchObject({
      version: old,
    });
    vi.useRealTimers();
  });

  it('that is published again meanwhile, with the same steps or others, is kept by those who see it', async () => {
    const { tenant, key, fresh } = await twoVersions();
    const texts = Array.from({ length: 30 }, (_, i) => `north ${i}`);
    const seenAfter = async (share: number) => {
      await activate(fresh, { tenant, rollout: [{ share, duration_s: 3600 }] });
      return await Promise.all(texts.map((text) => versionSeen(key, text)));
    };
    const first = await seenAfter(0.5);
    expect(await seenAfter(0.5)).toEqual(first);
    const more = await seenAfter(0.8);
    first.forEach((version, i) => {
      if (version === fresh) expect(more[i]).toBe(fresh);
    });
  });

  it('of what everyone sees already is refused, and says what to do', async () => {
    const { tenant, old, fresh } = await twoVersions();
    const rollout = [{ share: 0.5, duration_s: 3600 }];
    const again = (version: string, more: object) =>
      admin('POST', '/publications', { version, tenant, ...more });
    expect(await errorCode(again(old, { rollout }))).toBe('409 conflict');
    expect(await errorCode(again(old, { activate_at: inFuture(60_000) }))).toBe('409 conflict');
    await activate(fresh, { tenant, rollout });
    const refused = await again(old, { rollout });
    expect(refused.status).toBe(409);
    expect(await refused.text()).toContain('roll back');
    // To those who do not see it yet it may be led by other steps.
    await activate(fresh, { tenant, rollout: [{ share: 0.9, duration_s: 60 }] });
    expect(await live(tenant)).toMatchObject({ share: 0.9, base_version: old });
  });

  it('whose steps fall, or whose bounds say nothing, is refused', async () => {
    const { tenant, fresh } = await twoVersions();
    const falling = [
      { share: 0.5, duration_s: 1 },
      { share: 0.1, duration_s: 1 },
    ];
    for (const body of [
      { rollout: falling },
      { rollout: [{ share: 1, duration_s: 1 }] },
      { rollout: [{ share: 0.5, duration_s: 0 }] },
      { activate_at: 'tomorrow' },
      { auto_rollback: {} },
      { auto_rollback: { requests_min: 5 } },
      { auto_rollback: { tpot_ratio_max: 0.5 } },
    ]) {
      const answer = admin('POST', '/publications', { tenant, version: fresh, ...body });
      expect(await errorCode(answer)).toBe('400 invalid_request');
    }
  });
});
