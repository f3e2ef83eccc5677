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

it('keeps what came last, also where the one before takes longer to write', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-store-'));
  const store = createJobStore(folder, () => {});
  const slow = store.save({ ...JOB, error: 'x'.repeat(50_000_000) });
  await store.save({ ...JOB, status: 'succeeded' });
  await slow;
  expect(await store.load()).toMatchObject([{ status: 'succeeded' }]);
  rmSync(folder, { recursive: true });
});
