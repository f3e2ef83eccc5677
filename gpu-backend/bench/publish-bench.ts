/**
 * `bench publish`: requests go on while versions are published, at once and by and by, and rolled back. Every
 * answer must name one version that was live while it was made, with a mask of that version and of no other, and none
 * may fail. Each publication is of a version that was never live before, and the isolate that publishes serves what it
 * published from its answer on, so nothing that is old by then passes. (Other isolates have 5 s, of which
 * `test/workers/publications.test.ts` makes sure.) The edge is real, in workerd with a D1; the backend only answers what
 * it was told.
 */
import { once } from 'node:events';
import { Agent, createServer, type IncomingMessage, request } from 'node:http';
import type { AddressInfo } from 'node:net';
import { fileURLToPath } from 'node:url';
import {
  maskSetSummarySchema,
  type Publication,
  publicationSchema,
} from '../../shared/admin/publication-wire.ts';
import { type ModelHash, maskBits, maskFromSkippedLayers, maskId } from '../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { startEdge } from '../dev/local-edge.ts';
import { ensureApiKey } from '../dev/seed.ts';
import { type AdminClient, createAdminClient } from '../publication/admin-client.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'key-of-this-bench-0123456789abcdef';
const CLIENTS = 16;

export type PublishBench = {
  readonly bench: 'publish';
  readonly requests: number;
  readonly publications: number;
  readonly rollbacks: number;
  readonly gradual: number;
  readonly versionsSeen: number;
  readonly failed: number;
  /** Answers that name a version that was not live while they were made, or a mask of another version. */
  readonly wrong: number;
  /** Answers for which one version only was right: no change was under way, and none was gradual. */
  readonly oneRight: number;
  readonly took_s: number;
};

/** Requests see one of `versions`, the first of them from somewhen between the two times on. */
export type Change = {
  /** When it was asked for, and when the answer was there. */
  readonly asked_ms: number;
  readonly done_ms: number;
  readonly versions: readonly string[];
};
export type Answer = {
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
    const maskOf = await storeVersions(client, preset, counts.changes);
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
    const oneRight = answers.filter((answer) => rightVersions(answer, publisher.changes).size === 1);
    for (const { version, mask } of wrong.slice(0, 5)) say(`wrong: version ${version}, mask ${mask}`);
    return {
      bench: 'publish',
      requests: answers.length + failed,
      ...publisher.counts,
      versionsSeen: new Set(answers.map(({ version }) => version)).size,
      failed,
      wrong: wrong.length,
      oneRight: oneRight.length,
      took_s: Number(((performance.now() - started_ms) / 1000).toFixed(1)),
    };
  } finally {
    await edge.close();
    backend.close();
  }
}

/** Versions whose masks tell them apart: each skips another pair of an attention and an FFN block. */
async function storeVersions(
  client: AdminClient,
  preset: MaskSet,
  versions: number,
): Promise<Map<string, string>> {
  const { blockCount } = preset.model;
  const layers = blockCount / 2;
  if (versions > layers ** 2) throw new RangeError(`a model of ${layers} layers has too few masks`);
  const maskOf = new Map<string, string>();
  for (let index = 0; index < versions; index++) {
    const skipped = { skipAttention: [index % layers], skipFfn: [Math.floor(index / layers)] };
    const runs = maskFromSkippedLayers(blockCount, skipped);
    const mask = maskId(preset.model.hash as ModelHash, runs);
    const { surrogates: _, ...plain } = preset;
    const set: MaskSet = {
      ...{ ...plain, surrogate: false, name: `bench-${index}` },
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
  let used = 0;
  const post = (path: string, body: object): Promise<Publication> =>
    client.request({ method: 'POST', path: `/publications${path}`, body }, publicationSchema);
  return {
    changes,
    counts,
    async change(): Promise<void> {
      const kind = turn++ % 5;
      const asked_ms = performance.now();
      const note = (...seen: string[]) =>
        changes.push({ asked_ms, done_ms: performance.now(), versions: seen });
      if (kind === 4) {
        const { version: back } = await post('/rollback', {});
        if (back === null) throw new Error('a rollback left nothing live');
        note(back);
        settled = back;
        counts.rollbacks++;
        return;
      }
      const version = versions[used++]!;
      if (kind === 2 && settled !== undefined) {
        await post('', { version, rollout: [{ share: 0.5, duration_s: 3600 }] });
        note(version, settled);
        counts.gradual++;
      } else {
        await post('', { version });
        note(version);
        settled = version;
        counts.publications++;
      }
    },
  };
}

export const isWrong = (
  answer: Answer,
  changes: readonly Change[],
  maskOf: ReadonlyMap<string, string>,
): boolean =>
  !rightVersions(answer, changes).has(answer.version) || maskOf.get(answer.version) !== answer.mask;

/** What was live at any moment between a request and its answer: until the next change was done, and no longer. */
function rightVersions(
  { from_ms, to_ms }: Pick<Answer, 'from_ms' | 'to_ms'>,
  changes: readonly Change[],
): Set<string> {
  const during = changes.filter(({ asked_ms }, i) => {
    const ended_ms = changes[i + 1]?.done_ms ?? Number.POSITIVE_INFINITY;
    return asked_ms <= to_ms && ended_ms >= from_ms;
  });
  return new Set(during.flatMap(({ versions }) => versions));
}

/** @throws Error when the answer is none, or says one thing in its headers and another in its body. */
async function ask(
  agent: Agent,
  edge: string,
  apiKey: string,
  model: string,
  index: number,
): Promise<Answer> {
  const from_ms = performance.now();
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
  return { from_ms, to_ms: performance.now(), ...maskroute };
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
