/** The table that ships gives in workerd what it gives in calibration (`test/shared/embedding/static-encoder.test.ts`). */
import { env } from 'cloudflare:workers';
import { expect, it } from 'vitest';
import { loadStatic } from '../../../workers/routing/encoders/pick-encoder.ts';
import golden from '../../support/static-golden.json' with { type: 'json' };

it('a prompt has the same vector at the edge as in calibration', async () => {
  const encoder = await loadStatic(env);
  expect(encoder.spec.revision).toBe(golden.revision);
  const vectors = await encoder.embed(golden.rows.map((row) => row.text));
  golden.rows.forEach(({ vector }, row) => {
    vector.forEach((value, i) => {
      expect(vectors[row]![i]).toBeCloseTo(value, 6);
    });
  });
});
