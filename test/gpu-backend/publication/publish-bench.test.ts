/** A small round of the bench: requests during publications, gradual ones and rollbacks. */
import { expect, test } from 'vitest';
import { benchPublish } from '../../../gpu-backend/bench/publish.ts';
import { readMaskSet } from '../../../gpu-backend/publication/mask-set-file.ts';

test('every answer names one version that was live, with its own mask, and none fails', async () => {
  const preset = await readMaskSet('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
  const lines: string[] = [];
  const result = await benchPublish(preset, { requests: 600, changes: 15 }, (line) => lines.push(line));
  expect(lines).toEqual([]);
  expect(result).toMatchObject({ requests: 600, failed: 0, wrong: 0, versionsSeen: 4 });
  expect(result.publications + result.gradual + result.rollbacks).toBe(15);
});
