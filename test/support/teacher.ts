/** The full sentence encoder, fetched once into the tests' home. */
import { openFullEncoder } from '../../gpu-backend/encoder/full-encoder.ts';
import { testHome } from './installed-model.ts';

export const TEACHER_TIMEOUT_ms = 300_000;
export const openTestTeacher = () =>
  openFullEncoder('all-minilm-l6-v2', {
    home: testHome,
    // Other tests run beside this one; threads that wait for each other would crawl.
    threads: 1,
    hooks: { onProgress: () => {}, log: () => {} },
  });
