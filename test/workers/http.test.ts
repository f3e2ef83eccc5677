/** Who is let in, with what, and what the edge says of itself. The last two guess keys, and the last one makes backends. */
import { describe } from 'vitest';

describe('roles', async () => void (await import('./http/roles.ts')));
describe('bodies', async () => void (await import('./http/bodies.ts')));
describe('dashboard page', async () => void (await import('./http/dashboard-page.ts')));
describe('endpoints', async () => void (await import('./http/endpoints.ts')));
describe('rotation', async () => void (await import('./http/rotation.ts')));
describe('sign in', async () => void (await import('./http/sign-in.ts')));
describe('site', async () => void (await import('./http/site.ts')));
describe('authenticate', async () => void (await import('./http/authenticate.ts')));
describe('fuzz', async () => void (await import('./http/fuzz.ts')));
