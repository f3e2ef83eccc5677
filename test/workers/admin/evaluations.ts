/** What was measured of a mask set: kept beside it, and by whom. */
import { env } from 'cloudflare:workers';
import { describe, expect, it } from 'vitest';
import { EVALUATED_ROWS_MAX, type EvaluatedRow } from '../../../shared/admin/stats-wire.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';
import { admin, created, errorCode, makeMaskSet, newKey, newTenant, upload } from '../support/edge.ts';

const path = (version: string, tenant = '') => `/mask-sets/${version}/evaluation?tenant=${tenant}`;
const put = (version: string, body: unknown, key?: string, tenant = '') =>
  admin('PUT', path(version, tenant), body, key);

async function kept(version: string, key?: string, tenant = ''): Promise<EvaluatedRow[]> {
  const response = await admin('GET', path(version, tenant), undefined, key);
  expect(response.status).toBe(200);
  return (await response.json<{ data: EvaluatedRow[] }>()).data;
}

describe('an evaluation', () => {
  it('is kept by the figures that are drawn, and gives way to the next one', async () => {
    const { version } = await upload(makeMaskSet('evaluated'));
    expect(await kept(version)).toEqual([]);
    const evaluation = madeUpEvaluation(version);
    const answer = await put(version, evaluation);
    expect(answer.status).toBe(200);
    const { data } = await answer.json<{ data: EvaluatedRow[] }>();
    expect(data).toHaveLength(evaluation.rows.length + evaluation.equalTime.length);
    expect(data[1]).toEqual({
      method: 'learned',
      matched: 'count',
      maskSet: version,
      sparsity: 0.117,
      surrogate: true,
      kl: 0.26,
      agreement: 0.78,
      perplexity: 25.6,
      msPerToken: 5.2,
    });
    expect(await kept(version)).toEqual(data);
    expect((await put(version, { rows: evaluation.rows.slice(0, 2) })).status).toBe(200);
    expect(await kept(version)).toEqual(data.slice(0, 2));
  });

  it('that is none, or of another set, is refused with the reason', async () => {
    const { version } = await upload(makeMaskSet('evaluated-wrongly'));
    const { rows } = madeUpEvaluation(version);
    const wrong: [unknown, RegExp][] = [
      [{}, /rows/],
      [{ rows: [] }, /rows/],
      [{ rows: [{ ...rows[1], kl: '0.2' }] }, /rows\[0\]\.kl/],
      [{ rows: [{ ...rows[1], method: 'x'.repeat(65) }] }, /rows\[0\]\.method/],
      [{ rows: Array(EVALUATED_ROWS_MAX + 1).fill(rows[1]) }, /rows/],
      [madeUpEvaluation(`v_${'0'.repeat(24)}`), new RegExp(`No row is of ${version}`)],
    ];
    for (const [body, message] of wrong) {
      const response = await put(version, body);
      expect(await response.clone().text()).toMatch(message);
      expect(await errorCode(response)).toBe('400 invalid_request');
    }
    expect(await errorCode(put(`v_${'0'.repeat(24)}`, madeUpEvaluation(version)))).toBe('404 not_found');
    expect(await kept(version)).toEqual([]);
  });

  it('comes from whose set it is, and is read by whom the set is for', async () => {
    const { version: shared } = await upload(makeMaskSet('evaluated-for-all'));
    const [own, other] = [await newTenant(), await newTenant()];
    const { key } = await newKey({ tenant: own.tenant, kind: 'tenant_admin' });
    const { key: otherKey } = await newKey({ tenant: other.tenant, kind: 'tenant_admin' });
    expect(await errorCode(put(shared, madeUpEvaluation(shared), key))).toBe('403 forbidden');
    expect((await put(shared, madeUpEvaluation(shared))).status).toBe(200);
    expect(await kept(shared, key)).toHaveLength(14);

    const { version } = await upload(makeMaskSet('evaluated-own'), own.tenant);
    expect((await put(version, madeUpEvaluation(version), key)).status).toBe(200);
    expect(await kept(version, key)).toHaveLength(14);
    expect(await kept(version, undefined, own.tenant)).toHaveLength(14);
    expect(await errorCode(put(version, madeUpEvaluation(version), otherKey))).toBe('404 not_found');
    expect(await errorCode(admin('GET', path(version), undefined, otherKey))).toBe('404 not_found');
    expect(await errorCode(admin('GET', path(version, own.tenant), undefined, otherKey))).toBe(
      '403 forbidden',
    );
    // The same content of the default owner has figures of its own.
    await created(admin('POST', '/mask-sets', makeMaskSet('evaluated-own')));
    expect(await kept(version)).toEqual([]);
  });

  it('takes of the room that a tenant has for what it stores itself', async () => {
    const { tenant } = await newTenant();
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    const { version } = await upload(makeMaskSet('evaluated-at-length'), tenant, key);
    const { version: other } = await upload(makeMaskSet('evaluated-next'), tenant, key);
    const store = async (what: string) => {
      const statement = `UPDATE ${what} SET content_bytes = 99_999_900 WHERE owner = ?`;
      await env.DB.prepare(statement).bind(tenant).run();
    };
    expect((await put(version, madeUpEvaluation(version), key)).status).toBe(200);
    await store('evaluations');
    expect(await errorCode(admin('POST', '/mask-sets', makeMaskSet('one-more'), key))).toBe('409 conflict');
    const again = await admin('POST', '/mask-sets', makeMaskSet('evaluated-at-length'), key);
    expect([again.status, await again.json()]).toEqual([200, expect.objectContaining({ version, tenant })]);
    expect(await errorCode(put(other, madeUpEvaluation(other), key))).toBe('409 conflict');
    // Its operator is not held to that.
    expect((await put(other, madeUpEvaluation(other), undefined, tenant)).status).toBe(200);
    // What takes another one's place gives that one's room back.
    expect((await put(version, madeUpEvaluation(version), key)).status).toBe(200);
    expect((await admin('POST', '/mask-sets', makeMaskSet('one-more'), key)).status).toBe(201);
  });
});
