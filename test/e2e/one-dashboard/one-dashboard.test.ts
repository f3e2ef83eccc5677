/**
 * One product with its dashboard in a browser, and all that is done there: a start of both takes seconds. The order matters.
 * Mask sets come first: until then no set was live but that of the start. Lists come late, since they fill pages that other parts
 * read. Sessions come last, since they end for everybody.
 */
import { afterAll, beforeAll, describe } from 'vitest';
import { closeDashboard, openDashboard } from './open.ts';

beforeAll(openDashboard);
afterAll(closeDashboard);

describe('mask sets', async () => void (await import('./mask-sets.ts')));
describe('pages', async () => void (await import('./pages.ts')));
describe('console', async () => void (await import('./console.ts')));
describe('forms', async () => void (await import('./forms.ts')));
describe('experiments', async () => void (await import('./experiments.ts')));
describe('jobs', async () => void (await import('./jobs.ts')));
describe('strange texts', async () => void (await import('./strange-texts.ts')));
describe('lists', async () => void (await import('./lists.ts')));
describe('sign in', async () => void (await import('./sign-in.ts')));
describe('sessions', async () => void (await import('./sessions.ts')));
