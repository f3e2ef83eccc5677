/** Imports the file argv[3] into the home argv[2], one line a step; it lingers a moment in the conversion. */
import { pullModel } from '../../gpu-backend/cli/models.ts';

const pause = new Int32Array(new SharedArrayBuffer(4));
await pullModel(process.argv[3]!, {
  home: process.argv[2]!,
  weights: 'q8',
  log: (line) => console.log(`log ${line}`),
  onProgress({ phase }) {
    console.log(phase);
    // The tiny model is converted in no time: half a second leaves room to be killed or to be waited for.
    if (phase === 'convert') Atomics.wait(pause, 0, 0, 500);
  },
});
console.log('installed');
