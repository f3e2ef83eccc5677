/** What `cloudflare:workers` gives the tests: the worker's own environment, and the migrations. */
import type { D1Migration } from 'cloudflare:test';
import type { Env as EdgeEnv } from '../../../workers/env.ts';

declare module 'vitest' {
  interface ProvidedContext {
    /** A real OpenID Connect provider. */
    oidcUrl: string;
  }
}

declare global {
  namespace Cloudflare {
    interface Env extends EdgeEnv {
      TEST_MIGRATIONS: D1Migration[];
      /** A network in which every name is the test's backend, as a service of Workers VPC is one address. */
      TEST_NETWORK: Fetcher;
    }
    interface GlobalProps {
      mainModule: typeof import('../../../workers/index.ts');
    }
  }
}
