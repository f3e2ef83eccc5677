/** Checks every source file against the import rules; exits with 1 when one is broken. */
import { checkImports } from './import-rules.ts';

const FOLDERS = ['shared', 'workers', 'gpu-backend', 'scripts', 'test'];

const violations = checkImports('.', FOLDERS);
for (const { rule, why, what } of violations) console.error(`${rule}: ${what}\n  ${why}`);
console.log(violations.length === 0 ? 'Every import keeps the rules.' : `${violations.length} broken`);
process.exitCode = violations.length === 0 ? 0 : 1;
