/**
 * Builds the page that the worker delivers, and starts the servers that stand in for what the edge calls over the
 * network; they speak the real wire.
 */
import type { TestProject } from 'vitest/node';
import { buildDashboard } from '../../../scripts/build-dashboard.ts';
import { startBackend } from './backend-server.ts';
import { startEncoder } from './encoder-server.ts';
import { startOidcProvider } from './oidc-server.ts';

declare module 'vitest' {
  interface ProvidedContext {
    backendUrl: string;
    encoderUrl: string;
    oidcUrl: string;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  await buildDashboard();
  const [backend, encoder, oidc] = await Promise.all([startBackend(), startEncoder(), startOidcProvider()]);
  project.provide('backendUrl', backend.url);
  project.provide('encoderUrl', encoder.url);
  project.provide('oidcUrl', oidc.url);
  return async () => {
    await Promise.all([backend.close(), encoder.close(), oidc.close()]);
  };
}
