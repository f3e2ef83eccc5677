/**
 * How the edge on this machine reaches backends: through the binding that a deployed one has for a private network, so
 * that nothing is in between. Behind `fetch` Miniflare puts a worker of its own (image resizing, a header with the zone's
 * name), which no backend needs, and which costs as much as all that ours does.
 */
import { readFile } from 'node:fs/promises';

/** The binding's name in the worker, see `workers/env.ts`. */
export const BACKEND_NETWORK = 'BACKEND_NETWORK';

/** Every address, over http and https; trusted is whom browsers trust, and whom `NODE_EXTRA_CA_CERTS` names. */
export async function backendNetwork() {
  return {
    network: {
      allow: ['public', 'private'],
      deny: [],
      tlsOptions: { trustBrowserCas: true, trustedCertificates: await extraCertificates() },
    },
  };
}

const CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;

/** None when the file can't be read, as with Node itself, which warns of it. */
async function extraCertificates(): Promise<string[]> {
  const file = process.env.NODE_EXTRA_CA_CERTS;
  if (file === undefined) return [];
  const text = await readFile(file, 'utf8').catch(() => '');
  return text.match(CERTIFICATE) ?? [];
}
