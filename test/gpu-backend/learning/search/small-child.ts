/** A learning run in a process of its own, to be killed: `small-child.ts FOLDER OUT`. */
import { learn } from '../../../../gpu-backend/learning/learn.ts';
import { smallRun } from './small-run.ts';

const [folder, out] = process.argv.slice(2) as [string, string];
let results = 0;
await learn({ ...(await smallRun(folder, out)), onProgress: () => process.send?.(++results) });
