import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { createJobStore } from '../../../gpu-backend/jobs/job-store.ts';
import type { Job } from '../../../shared/admin/job-wire.ts';

const JOB: Job = {
  id: `job_${'0'.repeat(24)}`,
  object: 'maskroute.job',
  number: 1,
  status: 'running',
  schedule: null,
  request: { kind: 'learn', data: [{ path: 'a.jsonl' }], clusters: 2, sparsity: 0.1, encoder: 'static' },
  created_at: new Date(0).toISOString(),
  started_at: null,
  finished_at: null,
  starts: 1,
  progress: null,
  error: null,
  result: null,
};

it('orders jobs by number, and those that an older backend made meanwhile by date among them', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-store-'));
  const store = createJobStore(folder, () => {});
  // The clock was set back before the last.
  const made: readonly (readonly [number, minute: number])[] = [
    [1, 1],
    [2, 2],
    [0, 3],
    [0, 4],
    [3, 6],
    [4, 5],
  ];
  for (const [index, [number, minute]] of made.entries()) {
    const created_at = new Date(60_000 * minute).toISOString();
    await store.save({ ...JOB, id: `job_${String(index).repeat(24)}`, number, created_at });
  }
  const found = await store.load();
  expect(found.map(({ id }) => id.at(-1))).toEqual(['0', '1', '2', '3', '4', '5']);
  expect(found.map(({ number }) => number)).toEqual([1, 2, 2, 2, 3, 4]);
  rmSync(folder, { recursive: true });
});

it('keeps what came last, also where the one before takes longer to write', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-store-'));
  const store = createJobStore(folder, () => {});
  const slow = store.save({ ...JOB, error: 'x'.repeat(50_000_000) });
  await store.save({ ...JOB, status: 'succeeded' });
  await slow;
  expect(await store.load()).toMatchObject([{ status: 'succeeded' }]);
  rmSync(folder, { recursive: true });
});
