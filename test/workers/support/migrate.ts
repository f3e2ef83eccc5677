/** Every test file starts with a fresh D1, brought up by the real migrations. */
import { applyD1Migrations } from 'cloudflare:test';
import { env } from 'cloudflare:workers';

await applyD1Migrations(env.DB, env.TEST_MIGRATIONS);
// The encoder's library comes file by file here, which on a busy machine takes longer than the edge waits for it.
await import('@huggingface/inference');
