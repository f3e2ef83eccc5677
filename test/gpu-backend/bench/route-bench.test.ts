/** The bench of routing runs with every set that ships: also with those that need what a backend must serve. */
import { expect, test } from 'vitest';
import { benchRoute } from '../../../gpu-backend/bench/route-bench.ts';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';

test('the preset is routed', async () => {
  const set = await readMaskSet('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
  expect(set.surrogates).toBeDefined();
  const said: string[] = [];
  const result = await benchRoute(set, 10, { say: (line) => said.push(line) });
  expect(result).toMatchObject({ bench: 'route', requests: 10, clusters: set.clusters.length });
  expect(result.median_ms).toBeGreaterThan(0);
  expect(said).toHaveLength(2);
}, 60_000);
