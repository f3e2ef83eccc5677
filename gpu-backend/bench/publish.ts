/**
 * `bench publish`: requests go on while versions are published, at once and by and by, and rolled back. Every
 * answer must name one version that was live, with a mask of that version and of no other, and none may fail.
 * The edge is real, in workerd with a D1; the backend only answers what it was told.
 */
import { once } from 'node:events';
import { Agent, createServer, type IncomingMessage, request } from 'node:http';
import type { AddressInfo } from 'node:net';
import { fileURLToPath } from 'node:url';
import { maskSetSummarySchema, type Publication, publicationSchema } from '../../shared/admin.ts';
import { type ModelHash, maskBits, maskFromSkippedLayers, maskId } from '../../shared/mask.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask-set.ts';
import { startEdge } from '../dev/edge.ts';
import { ensureApiKey } from '../dev/seed.ts';
import { type AdminClient, createAdminClient } from '../publication/admin-client.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'key-of-this-bench-0123456789abcdef';
const VERSIONS = 4;
const CLIENTS = 16;
/** The time in which every isolate sees a publication. */
const SEEN_WITHIN_ms = 5_000;

export type PublishBench = {
  readonly bench: 'publish';
  readonly requests: number;
  readonly publications: number;
  readonly rollbacks: number;
  readonly gradual: number;
  readonly versionsSeen: number;
  readonly failed: number;
  /** Answers that name a version that was not live, or a mask of another version. */
  readonly wrong: number;
  readonly took_s: number;
};

/** From `at_ms` on, requests see one of these. */
type Change = { readonly at_ms: number; readonly versions: readonly string[] };
type Answer = {
  readonly from_ms: number;
  readonly to_ms: number;
  readonly version: string;
  readonly mask: string;
};

export async function benchPublish(
  preset: MaskSet,
  counts: { readonly requests: number; readonly changes: number },
  say: (line: string) => void,
): Promise<PublishBench> {
  const backend = await serveEcho(preset);
  const edge = await startEdge({
    projectFolder: PROJECT_FOLDER,
    stateFolder: undefined,
    port: 0,
    bindings: { BACKEND_URL: backend.url, BACKEND_KEY: KEY, ADMIN_KEY: KEY, COMPARISON_SHARE: '0' },
  });
  try {
    const client = createAdminClient(edge.url, KEY);
    const apiKey = await ensureApiKey(client, undefined);
    const maskOf = await storeVersions(client, preset);
    const started_ms = performance.now();
    const publisher = createPublisher(client, [...maskOf.keys()]);
    await publisher.change();
    const answers: Answer[] = [];
    let failed = 0;
    let left = counts.requests;
    const reader = async (): Promise<void> => {
      const agent = new Agent({ keepAlive: true, maxSockets: 1 });
      while (left > 0) {
        const index = left--;
        const answer = await ask(agent, edge.url, apiKey, preset.model.name, index).catch((error) => {
          say(`request ${index}: ${error}`);
          return undefined;
        });
        if (answer === undefined) failed++;
        else answers.push(answer);
      }
      agent.destroy();
    };
    const publishing = async (): Promise<void> => {
      for (let done = 1; done < counts.changes && left > 0; done++) {
        // Spread over the requests, so that each change meets some under way.
        const next = counts.requests * (1 - done / counts.changes);
        while (left > next) await new Promise((resolve) => setTimeout(resolve, 1));
        await publisher.change();
      }
    };
    await Promise.all([publishing(), ...Array.from({ length: CLIENTS }, reader)]);
    const wrong = answers.filter((answer) => isWrong(answer, publisher.changes, maskOf));
    for (const { version, mask } of wrong.slice(0, 5)) say(`wrong: version ${version}, mask ${mask}`);
    return {
      bench: 'publish',
      requests: answers.length + failed,
      ...publisher.counts,
      versionsSeen: new Set(answers.map(({ version }) => version)).size,
      failed,
      wrong: wrong.length,
      took_s: Number(((performance.now() - started_ms) / 1000).toFixed(1)),
    };
  } finally {
    await edge.close();
    backend.close();
  }
}

/** Versions whose masks tell them apart: each skips one attention block, and each another one. */
async function storeVersions(client: AdminClient, preset: MaskSet): Promise<Map<string, string>> {
  const maskOf = new Map<string, string>();
  for (let layer = 0; layer < VERSIONS; layer++) {
    const runs = maskFromSkippedLayers(preset.model.blockCount, { skipAttention: [layer], skipFfn: [] });
    const mask = maskId(preset.model.hash as ModelHash, runs);
    const { surrogates: _, ...plain } = preset;
    const set: MaskSet = {
      ...{ ...plain, surrogate: false, name: `bench-${layer}` },
      clusters: preset.clusters.map((cluster) => ({ ...cluster, mask, bits: maskBits(runs) })),
    };
    maskOf.set(maskSetVersion(set), mask);
    await client.request({ method: 'POST', path: '/mask-sets', body: set }, maskSetSummarySchema);
  }
  return maskOf;
}

/** Publishes at once, publishes by and by, and rolls back, in turn. */
function createPublisher(client: AdminClient, versions: readonly string[]) {
  const changes: Change[] = [];
  const counts = { publications: 0, rollbacks: 0, gradual: 0 };
  let settled: string | undefined;
  let turn = 0;
  const post = (path: string, body: object): Promise<Publication> =>
    client.request({ method: 'POST', path: `/publications${path}`, body }, publicationSchema);
  return {
    changes,
    counts,
    async change(): Promise<void> {
      const kind = turn++ % 5;
      const version = versions[turn % versions.length]!;
      // Noted before it is asked for: the answer comes after the first request may have seen it.
      const at_ms = Date.now();
      if (kind === 4) {
        const { version: back } = await post('/rollback', {});
        if (back === null) throw new Error('a rollback left nothing live');
        changes.push({ at_ms, versions: [back] });
        settled = back;
        counts.rollbacks++;
      } else if (kind === 2 && settled !== undefined) {
        await post('', { version, rollout: [{ share: 0.5, duration_s: 3600 }] });
        changes.push({ at_ms, versions: [version, settled] });
        counts.gradual++;
      } else {
        await post('', { version });
        changes.push({ at_ms, versions: [version] });
        settled = version;
        counts.publications++;
      }
    },
  };
}

function isWrong(
  { from_ms, to_ms, version, mask }: Answer,
  changes: readonly Change[],
  maskOf: ReadonlyMap<string, string>,
): boolean {
  const wasLive = changes.some(({ at_ms, versions }, i) => {
    const endsAt_ms = changes[i + 1]?.at_ms ?? Number.POSITIVE_INFINITY;
    return at_ms <= to_ms && endsAt_ms >= from_ms - SEEN_WITHIN_ms && versions.includes(version);
  });
  return !wasLive || maskOf.get(version) !== mask;
}

/** @throws Error when the answer is none, or says one thing in its headers and another in its body. */
async function ask(
  agent: Agent,
  edge: string,
  apiKey: string,
  model: string,
  index: number,
): Promise<Answer> {
  const from_ms = Date.now();
  const headers = { authorization: `Bearer ${apiKey}`, 'content-type': 'application/json' };
  const outgoing = request(`${edge}/v1/chat/completions`, { agent, method: 'POST', headers });
  outgoing.end(JSON.stringify({ model, messages: [{ role: 'user', content: `question ${index}` }] }));
  const [response] = (await once(outgoing, 'response')) as [IncomingMessage];
  let text = '';
  for await (const chunk of response) text += chunk;
  if (response.statusCode !== 200) throw new Error(`${response.statusCode} ${text}`);
  const { maskroute } = JSON.parse(text) as { maskroute: { version: string; mask: string } };
  const named = ['version', 'mask'].map((name) => response.headers[`x-maskroute-${name}`]).join(' ');
  if (named !== `${maskroute.version} ${maskroute.mask}`) throw new Error(`${named}, but the body: ${text}`);
  return { from_ms, to_ms: Date.now(), ...maskroute };
}

/** A backend that serves the model and repeats the mask and the decision that it was given. */
async function serveEcho({ model }: MaskSet) {
  const maskroute = { hash: model.hash, block_count: model.blockCount, context_tokens: 2048, dense: false };
  const entry = { id: model.name, object: 'model', created: 0, owned_by: 'bench', maskroute };
  const server = createServer(async (incoming, response) => {
    let text = '';
    for await (const chunk of incoming) text += chunk;
    const body = text === '' ? undefined : JSON.parse(text);
    const answer =
      body === undefined
        ? { object: 'list', data: [entry] }
        : { id: 'chatcmpl-1', object: 'chat.completion', maskroute: { ...body.maskroute, mask: body.mask } };
    response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(answer));
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  const { port } = server.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}`, close: () => server.close() };
}
