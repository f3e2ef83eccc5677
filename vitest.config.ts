/**
 * Three projects: what runs in Node runs in Node; the edge runs in workerd, the runtime that it is deployed to,
 * with the bindings of wrangler.toml, a real D1 and the real migrations; the whole product runs by itself.
 */
import { cloudflareTest, readD1Migrations } from '@cloudflare/vitest-pool-workers';
import { defineConfig } from 'vitest/config';
import { ADMIN_KEY, BACKEND_KEY, EDGE_URL, ENCODER } from './test/support/edge/constants.ts';

export default defineConfig({
  test: {
    // The edge logs as it does in production; only a failed test's lines are wanted.
    silent: 'passed-only',
    projects: [
      {
        test: {
          name: 'node',
          include: ['test/**/*.test.ts'],
          exclude: ['test/workers/**', 'test/e2e/**'],
          testTimeout: 30_000,
        },
      },
      {
        // The whole product, one after the other and after everything else: it needs the machine for itself.
        test: {
          name: 'e2e',
          include: ['test/e2e/**/*.test.ts'],
          fileParallelism: false,
          sequence: { groupOrder: 1 },
          testTimeout: 60_000,
        },
      },
      {
        plugins: [
          cloudflareTest(async ({ inject }) => ({
            wrangler: { configPath: './wrangler.toml' },
            remoteBindings: false,
            miniflare: {
              serviceBindings: {
                TEST_NETWORK: { external: { address: new URL(inject<string>('backendUrl')).host, http: {} } },
              },
              ratelimits: {
                // Small enough to be reached in a test.
                TENANT_BURST: { namespace_id: '1001', simple: { limit: 100, period: 10 } },
                // One administrator makes everything that the tests need.
                ADMIN_BURST: { namespace_id: '1003', simple: { limit: 100_000, period: 10 } },
              },
              bindings: {
                BACKEND_URL: inject<string>('backendUrl'),
                EDGE_URL,
                TRUSTED_FRONT: 'cloudflare',
                BACKEND_KEY,
                ADMIN_KEY,
                ENCODER: 'huggingface',
                HF_ENDPOINT_URL: inject<string>('encoderUrl'),
                HF_MODEL: ENCODER.id,
                HF_REVISION: ENCODER.revision,
                HF_POOLING: ENCODER.pooling,
                HF_DIMENSIONS: String(ENCODER.dimensions),
                TEST_MIGRATIONS: await readD1Migrations('./migrations'),
              },
            },
          })),
        ],
        test: {
          name: 'workers',
          include: ['test/workers/**/*.test.ts'],
          globalSetup: ['test/support/edge/global-setup.ts'],
          setupFiles: ['test/workers/support/migrate.ts'],
          // The encoder's library has hundreds of files, and each test file would load them one by one.
          deps: { optimizer: { ssr: { enabled: true, include: ['@huggingface/inference'] } } },
          testTimeout: 30_000,
        },
      },
    ],
  },
});
