/**
 * A peer of `bench edge` in a process of its own, which ends with the bench, also when that is killed: Portkey's gateway, or
 * the floor, whose workerd would outlive its parent. The argument says which.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { convertV4MiniflareOptions, Log, LogLevel, Miniflare } from 'miniflare';
import { serveParent } from '../dev/children.ts';

export type FloorConfig = {
  /** The address to which requests are forwarded. */
  readonly upstream: string;
  /** The bench's folder, for Miniflare's temporary files: it begins to remove them at its end, and this process ends sooner. */
  readonly folder: string;
};

export type PortkeyConfig = {
  /** Portkey's server. */
  readonly script: string;
  readonly port: number;
};

/** The floor has the edge's bindings: a socket straight to the worker, and a network binding without a proxy. */
async function startFloor({ upstream, folder }: FloorConfig) {
  process.env.TMPDIR = folder;
  const contents = `export const floor = {
    fetch: (request, env) => env.NETWORK.fetch('${upstream}', {
      method: 'POST', headers: { 'content-type': 'application/json' }, body: request.body,
    }),
  };
  export default floor;`;
  const miniflare = new Miniflare(
    convertV4MiniflareOptions({
      host: '127.0.0.1',
      port: 0,
      log: new Log(LogLevel.ERROR),
      logRequests: false,
      cf: {},
      workers: [
        {
          name: 'floor',
          modules: [{ type: 'ESModule', path: 'floor.js', contents }],
          compatibilityDate: '2026-08-01',
          unsafeDirectSockets: [{ host: '127.0.0.1', port: 0, entrypoint: 'floor' }],
          serviceBindings: { NETWORK: { network: { allow: ['public', 'private'], deny: [] } } },
        },
      ],
    }),
  );
  await miniflare.ready;
  const { origin } = await miniflare.unsafeGetDirectURL('floor', 'floor');
  return { url: origin, close: () => miniflare.dispose() };
}

/** Resolves once it answers; the bench bounds how long that may take. */
async function startPortkey({ script, port }: PortkeyConfig) {
  // It reads its arguments from here.
  process.argv.push(`--port=${port}`, '--headless');
  await import(script);
  const url = `http://127.0.0.1:${port}`;
  while (!(await answers(url))) await sleep(100);
  return { url, close: async () => {} };
}

const answers = (url: string): Promise<boolean> =>
  fetch(url).then(
    () => true,
    () => false,
  );

if (process.argv[2] === 'floor') serveParent(startFloor);
else serveParent(startPortkey);
