/** A real HTTP server that speaks as much of the Hugging Face hub's protocol as a pull needs, and can misbehave. */
import { createHash, randomUUID } from 'node:crypto';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';

const COMMIT = '0123456789abcdef0123456789abcdef01234567';

export type FakeHub = {
  readonly url: string;
  /** `METHOD path range` of every request. */
  readonly requests: string[];
  close(): Promise<void>;
};

export type HubOptions = {
  readonly repository: string;
  readonly files: Readonly<Record<string, Uint8Array>>;
  /** Breaks the connection after so many bytes of each of the first answers with a file, or the rest of one. */
  readonly breaks?: { readonly file: string; readonly afterBytes: number; times: number };
  /** Redirects to a link of which each answer uses one up, as the hub's signed links expire. */
  readonly linksExpire?: boolean;
  /** Announces another hash than the content's. */
  readonly wrongHashOf?: string;
  readonly token?: string;
  /** The files need the token, and what there is does not, as the hub has it for gated models. */
  readonly isGated?: boolean;
  /** Branches and tags beside what the hub shows first; all lead to the same commit. */
  readonly revisions?: readonly string[];
};

export async function startFakeHub(options: HubOptions): Promise<FakeHub> {
  const requests: string[] = [];
  const usedLinks = new Set<string>();
  const server = createServer((request, response) => {
    requests.push(`${request.method} ${request.url} ${request.headers.range ?? ''}`.trim());
    answer(options, usedLinks, request, response);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    requests,
    close: () =>
      new Promise((resolve) => {
        server.closeAllConnections();
        server.close(() => resolve());
      }),
  };
}

function answer(
  options: HubOptions,
  usedLinks: Set<string>,
  request: IncomingMessage,
  response: ServerResponse,
): ServerResponse {
  const { pathname, searchParams } = new URL(request.url!, 'http://hub');
  const json = (status: number, body: unknown) => {
    response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));
    return response;
  };
  const isOpen = options.isGated === true && pathname.startsWith('/api/');
  if (options.token !== undefined && !isOpen && request.headers.authorization !== `Bearer ${options.token}`) {
    return json(401, { error: 'Invalid credentials' });
  }
  const revisions = ['HEAD', COMMIT, ...(options.revisions ?? [])];
  if (revisions.some((name) => pathname === `/api/models/${options.repository}/revision/${name}`)) {
    return json(200, { _id: '1', id: options.repository, sha: COMMIT, private: false, gated: false });
  }
  if (pathname === `/api/models/${options.repository}/tree/${COMMIT}`) {
    return json(
      200,
      Object.entries(options.files).map(([path, bytes]) => treeEntry(options, path, bytes)),
    );
  }
  const prefix = `/${options.repository}/resolve/${COMMIT}/`;
  const name = pathname.startsWith(prefix) ? decodeURIComponent(pathname.slice(prefix.length)) : '';
  const bytes = options.files[name];
  if (bytes === undefined) return json(404, { error: 'Not found' });
  if (options.linksExpire === true) {
    const link = searchParams.get('link');
    if (link === null) {
      const location = `${pathname}?link=${randomUUID()}`;
      return response.writeHead(302, { location }).end();
    }
    if (usedLinks.has(link)) return json(403, { error: 'The link has expired' });
    usedLinks.add(link);
  }
  return sendFile(options, name, bytes, request, response);
}

function treeEntry(options: HubOptions, path: string, bytes: Uint8Array) {
  const sha256 = createHash('sha256').update(bytes).digest('hex');
  const oid = path === options.wrongHashOf ? '0'.repeat(64) : sha256;
  const lfs = /\.(safetensors|gguf)$/.test(path)
    ? { lfs: { oid, size: bytes.length, pointerSize: 134 } }
    : {};
  return { type: 'file', path, size: bytes.length, oid: '0'.repeat(40), ...lfs };
}

function sendFile(
  { breaks }: HubOptions,
  name: string,
  bytes: Uint8Array,
  request: IncomingMessage,
  response: ServerResponse,
): ServerResponse {
  const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '');
  const start = range === null ? 0 : Number(range[1]);
  const end = range === null || range[2] === '' ? bytes.length : Number(range[2]) + 1;
  response.writeHead(range === null ? 200 : 206, {
    etag: '"etag"',
    'content-length': end - start,
    ...(range !== null && { 'content-range': `bytes ${start}-${end - 1}/${bytes.length}` }),
  });
  if (breaks !== undefined && breaks.file === name && breaks.times > 0) {
    breaks.times--;
    // After a moment, so that what was sent has arrived.
    response.write(bytes.subarray(start, start + breaks.afterBytes), () =>
      setTimeout(() => response.destroy(), 100),
    );
    return response;
  }
  return response.end(bytes.subarray(start, end));
}
