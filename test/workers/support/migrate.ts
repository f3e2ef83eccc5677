/** Every test file starts with a fresh D1, brought up by the real migrations. */
import { applyD1Migrations } from 'cloudflare:test';
import { env } from 'cloudflare:workers';

await applyD1Migrations(env.DB, env.TEST_MIGRATIONS);
// Loading the encoder's library may take longer on a busy machine than the edge waits for it.
await import('@huggingface/inference');
