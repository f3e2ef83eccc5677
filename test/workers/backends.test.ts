/** Backends: who is asked, what a broken one costs, and how they are reached. The registry comes first: it is empty then. */
import { describe } from 'vitest';

describe('backends', async () => void (await import('./backends/backends.ts')));
describe('backend costs', async () => void (await import('./backends/backend-costs.ts')));
describe('backend network', async () => void (await import('./backends/backend-network.ts')));
describe('service tokens', async () => void (await import('./backends/service-tokens.ts')));
