/** What became of requests, and a database that does not answer. */
import { describe } from 'vitest';

describe('completion ids', async () => void (await import('./counting/completion-ids.ts')));
describe('outcomes', async () => void (await import('./counting/outcomes.ts')));
describe('compare dense', async () => void (await import('./counting/compare-dense.ts')));
describe('d1 stalled', async () => void (await import('./db/d1-stalled.ts')));
