/**
 * What runs in Node runs in Node (`alone`: each file in a process of its own); the edge runs in workerd, which it is deployed to,
 * with the bindings of wrangler.toml, a real D1 and the real migrations; the whole product runs by itself.
 */
import { existsSync, mkdirSync, readdirSync, rmSync, statfsSync } from 'node:fs';
import { availableParallelism, freemem } from 'node:os';
import { join } from 'node:path';
import { cloudflareTest, readD1Migrations } from '@cloudflare/vitest-plugin';
import { defineConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';
import { COMPILED_FOLDER } from './gpu-backend/compiled-folder.js';
import { ADMIN_KEY, BACKEND_KEY, EDGE_URL, ENCODER } from './test/support/edge/constants.ts';

// The tests' processes find what an earlier one compiled, as what they start does.
process.env.NODE_COMPILE_CACHE ??= COMPILED_FOLDER;

/** Tests write and delete gigabytes: models, databases, homes. In memory that takes an eighth of the time. */
const MEMORY_FOLDER = '/dev/shm';
const ROOM_BYTES = 6e9;
if (process.env.TMPDIR === undefined && hasRoom()) process.env.TMPDIR = ownFolder();

function hasRoom(): boolean {
  if (!existsSync(MEMORY_FOLDER) || freemem() < 2 * ROOM_BYTES) return false;
  const { bavail, bsize } = statfsSync(MEMORY_FOLDER);
  return bavail * bsize > ROOM_BYTES;
}

/** It goes with this process; what a killed one left goes with the next. */
function ownFolder(): string {
  const prefix = 'maskroute-tests-';
  const remove = (name: string) => rmSync(join(MEMORY_FOLDER, name), { recursive: true, force: true });
  for (const name of readdirSync(MEMORY_FOLDER)) {
    if (name.startsWith(prefix) && !existsSync(`/proc/${name.slice(prefix.length)}`)) remove(name);
  }
  const own = `${prefix}${process.pid}`;
  process.once('exit', () => remove(own));
  const folder = join(MEMORY_FOLDER, own);
  mkdirSync(folder, { recursive: true });
  return folder;
}

/** What the worker imports. One that is missing here is loaded file by file, by every test file anew. */
const LIBRARIES_OF_THE_EDGE = [
  ...['@huggingface/inference', '@huggingface/tokenizers', 'ml-pca'],
  ...['@noble/hashes/hkdf.js', '@noble/hashes/hmac.js', '@noble/hashes/sha2.js', '@noble/hashes/utils.js'],
  ...['@opentelemetry/api', '@opentelemetry/core', '@opentelemetry/otlp-transformer'],
  ...['@opentelemetry/resources', '@opentelemetry/sdk-trace'],
  ...['drizzle-orm', 'drizzle-orm/d1', 'drizzle-orm/sqlite-core'],
  ...['hono', 'hono/accepts', 'hono/cookie', 'hono/cors', 'hono/factory', 'hono/html', 'hono/jwt'],
  ...['hono/route', 'hono/secure-headers'],
  ...['eventsource-parser/stream', 'fast-check', 'lru-cache', 'oauth4webapi', 'zod'],
];

/** Tests of the edge that need nothing of workerd. */
const PLAIN = [
  'test/workers/backends/choose.test.ts',
  'test/workers/base/swr-cache.test.ts',
  'test/workers/requests/kept-texts.test.ts',
];

/** They replace a module, measure how much memory their process took, or open a backend in it, which sets V8's flags. */
const ALONE = [
  'test/gpu-backend/api/real-model.test.ts',
  'test/gpu-backend/engine/webgpu.test.ts',
  'test/gpu-backend/model/formats/hostile-gguf.test.ts',
];

/** One more than there are cores: many files wait for clocks half of the time. */
const FILES_AT_ONCE = availableParallelism() + 1;

/** What is started and stopped around tests takes seconds, and many of them where a machine has other work. */
const HOOKS_ms = 120_000;

/** Node's own loader reads tests and sources as it reads the product's: nothing is transformed, or told over to each process. */
const AS_IT_IS = { viteModuleRunner: false, nodeLoader: false };

/**
 * What starts a product, or a runtime, comes first: it waits for much, and none may be left for the end, where it would run
 * alone for a minute. Files in Node run one after the other in the same process as long as the next one is of them, too, so they
 * stay together.
 */
class StartersFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const { node = [], ...starters } = Object.groupBy(await super.sort(files), ({ project }) => project.name);
    // In turns: two products at a time would be in each other's way.
    const place = new Map(
      Object.values(starters).flatMap((some) => some!.map((file, index) => [file, index / some!.length])),
    );
    return [...[...place.keys()].sort((a, b) => place.get(a)! - place.get(b)!), ...node];
  }
}

export default defineConfig({
  test: {
    // The edge logs as it does in production; only a failed test's lines are wanted.
    silent: 'passed-only',
    // Other tests run beside the products and commands that a test starts, and threads that wait for each other would crawl.
    env: { MASKROUTE_THREADS: '1' },
    maxWorkers: FILES_AT_ONCE,
    sequence: { sequencer: StartersFirst },
    projects: [
      {
        test: {
          name: 'node',
          include: ['test/!(workers|e2e)/**/*.test.ts', 'test/*.test.ts', ...PLAIN],
          exclude: ALONE,
          // Each file would load the same modules again.
          isolate: false,
          // Plain loops over logits make much garbage: collected less often it takes 3 to 6 % less time.
          execArgv: ['--max-semi-space-size=64'],
          experimental: AS_IT_IS,
          testTimeout: 60_000,
          hookTimeout: HOOKS_ms,
        },
      },
      {
        test: {
          name: 'alone',
          include: ALONE,
          testTimeout: 60_000,
          hookTimeout: HOOKS_ms,
        },
      },
      {
        test: {
          name: 'e2e',
          include: ['test/e2e/**/*.test.ts'],
          experimental: AS_IT_IS,
          testTimeout: 120_000,
          hookTimeout: HOOKS_ms,
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
              // A batch is counted at once: tests wait for it.
              queueConsumers: {
                'maskroute-events': {
                  maxBatchSize: 100,
                  maxBatchTimeout: 0.05,
                  maxRetries: 100,
                  retryDelay: 30,
                  deadLetterQueue: 'maskroute-events-dead',
                },
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
          // Each is a runtime of its own, which takes two seconds to start, so what is of a subject stands together.
          include: ['test/workers/*.test.ts'],
          globalSetup: ['test/support/edge/global-setup.ts'],
          setupFiles: ['test/workers/support/migrate.ts'],
          // Libraries have hundreds of files, and each test file would load them one by one.
          deps: { optimizer: { ssr: { enabled: true, include: LIBRARIES_OF_THE_EDGE } } },
          testTimeout: 60_000,
          hookTimeout: HOOKS_ms,
        },
      },
    ],
  },
});
