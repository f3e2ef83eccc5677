/** Every test file starts with a fresh D1, brought up by the real migrations, in a runtime that other files used before. */
import { applyD1Migrations, reset } from 'cloudflare:test';
import { env } from 'cloudflare:workers';

await reset();
await applyD1Migrations(env.DB, env.TEST_MIGRATIONS);
// Loading the encoder's library may take longer on a busy machine than the edge waits for it.
await import('@huggingface/inference');
