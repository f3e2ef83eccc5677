/** The full sentence encoder, fetched once into the tests' home. */
import { openTeacher } from '../../gpu-backend/calibration/encoders.ts';
import { testHome } from './installed-model.ts';

export const TEACHER_TIMEOUT_ms = 300_000;
export const openTestTeacher = () =>
  openTeacher('all-minilm-l6-v2', {
    home: testHome,
    threads: 2,
    hooks: { onProgress: () => {}, log: () => {} },
  });
