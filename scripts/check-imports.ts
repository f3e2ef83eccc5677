/** Checks every source file against the import rules; exits with 1 and one line a violation when one is broken. */
import { cruise } from 'dependency-cruiser';
import { OPTIONS, RESOLVE_OPTIONS } from './import-rules.ts';

const FOLDERS = ['shared', 'workers', 'gpu-backend', 'scripts', 'test'];

const { output, exitCode } = await cruise(FOLDERS, { ...OPTIONS, outputType: 'err-long' }, RESOLVE_OPTIONS);
console.log(output);
process.exitCode = exitCode === 0 ? 0 : 1;
