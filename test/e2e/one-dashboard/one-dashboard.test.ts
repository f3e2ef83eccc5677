/**
 * One product with its dashboard in a browser, and all that is done there: a start of both takes seconds. Mask sets come first,
 * while the one that the product began with is the only one that was live. Lists fill pages that others read, and the sessions
 * end for everybody.
 */
import { afterAll, beforeAll, describe } from 'vitest';
import { closeDashboard, openDashboard } from './open.ts';

beforeAll(openDashboard);
afterAll(closeDashboard);

describe('mask sets', async () => void (await import('./mask-sets.ts')));
describe('pages', async () => void (await import('./pages.ts')));
describe('console', async () => void (await import('./console.ts')));
describe('experiments', async () => void (await import('./experiments.ts')));
describe('jobs', async () => void (await import('./jobs.ts')));
describe('lists', async () => void (await import('./lists.ts')));
describe('sign in', async () => void (await import('./sign-in.ts')));
describe('sessions', async () => void (await import('./sessions.ts')));
