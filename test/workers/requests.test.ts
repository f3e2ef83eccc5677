/** One request, from its body to the last byte of its answer. */
import { describe } from 'vitest';

describe('index', async () => void (await import('./index.ts')));
describe('completions', async () => void (await import('./requests/completions.ts')));
describe('requests', async () => void (await import('./requests/requests.ts')));
describe('settlement', async () => void (await import('./requests/settlement.ts')));
describe('traces', async () => void (await import('./requests/traces.ts')));
describe('waiting', async () => void (await import('./base/waiting.ts')));
