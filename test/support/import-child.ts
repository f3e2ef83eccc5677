/** Imports the file argv[3] into the home argv[2], one line a step; it lingers a moment where the conversion begins. */
import { pullModel } from '../../gpu-backend/cli/models.ts';

const pause = new Int32Array(new SharedArrayBuffer(4));
let lingered = false;
await pullModel(process.argv[3]!, {
  home: process.argv[2]!,
  weights: 'q8',
  log: (line) => console.log(`log ${line}`),
  onProgress({ phase }) {
    console.log(phase);
    if (phase !== 'convert' || lingered) return;
    lingered = true;
    // The tiny model is converted in no time: a second leaves room to be killed or to be waited for.
    Atomics.wait(pause, 0, 0, 1_000);
  },
});
console.log('installed');
