/**
 * `bench publish`: sends requests while versions are published (at once, and as gradual rollouts) and rolled back. Every
 * answer must name a version that was live during its request, with that version's mask, and no request may fail: both
 * counts must be 0. Each publication is of a version that was never live before. The isolate that publishes serves the new
 * version as soon as it has answered, so an older version counts as wrong. (Other isolates follow within 5 s, which
 * `test/workers/releases/publishing.ts` tests.) The edge is real, in workerd with D1; the backend echoes what it gets.
 */
import { once } from 'node:events';
import { Agent, createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Publication, publicationSchema } from '../../shared/admin/publication-wire.ts';
import { type ModelHash, maskBits, maskFromSkippedLayers, maskId } from '../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type BenchHooks, round } from '../measure.ts';
import type { AdminClient } from '../publication/admin-client.ts';
import { storeMaskSet } from '../publication/publish.ts';
import { type BenchEdge, call, openEdge } from './edge-peers.ts';

const CLIENTS = 16;

type PublishBench = {
  readonly bench: 'publish';
  readonly requests: number;
  readonly publications: number;
  readonly rollbacks: number;
  readonly gradual: number;
  readonly versionsSeen: number;
  readonly failed: number;
  /** Answers that name a version that was not live during the request, or a mask of another version. */
  readonly wrong: number;
  /** Answers for which only one version was right, as no change and no rollout was under way. */
  readonly oneRight: number;
  readonly took_s: number;
};

/** A change of what is live: requests get one of `versions`, from some moment between the two times on. */
export type Change = {
  /** When the change was requested, and when it was answered. */
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

/** State that the clients share: the requests left to send, and the results so far. */
type Sending = { left: number; failed: number; readonly answers: Answer[] };

export async function benchPublish(
  preset: MaskSet,
  counts: { readonly requests: number; readonly changes: number },
  { say, signal }: BenchHooks,
): Promise<PublishBench> {
  checkChanges(preset, counts.changes);
  await using started = new AsyncDisposableStack();
  const backend = await serveEcho(preset);
  started.defer(backend.close);
  const edge = await openEdge(backend.url, signal);
  started.defer(edge.stop);
  const maskOf = await storeVersions(edge.client, preset, counts.changes);
  const started_ms = performance.now();
  const publisher = createPublisher(edge.client, [...maskOf.keys()]);
  await publisher.change();
  const sending: Sending = { left: counts.requests, failed: 0, answers: [] };
  const clients = Array.from({ length: CLIENTS }, () =>
    send(sending, edge, preset.model.name, { say, signal }),
  );
  await Promise.all([publishMeanwhile(publisher, sending, counts, signal), ...clients]);
  signal?.throwIfAborted();
  const { answers, failed } = sending;
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
    took_s: round((performance.now() - started_ms) / 1000, 1),
  };
}

/** One client: sends until nothing is left. */
async function send(
  sending: Sending,
  edge: BenchEdge,
  model: string,
  { say, signal }: BenchHooks,
): Promise<void> {
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  while (sending.left > 0 && signal?.aborted !== true) {
    const index = sending.left--;
    try {
      sending.answers.push(await ask(agent, edge, model, index));
    } catch (error) {
      say(`request ${index}: ${error}`);
      sending.failed++;
    }
  }
  agent.destroy();
}

/** @throws Error when refused, or when the answer's headers and body do not agree. */
async function ask(agent: Agent, edge: BenchEdge, model: string, index: number): Promise<Answer> {
  const headers = { authorization: `Bearer ${edge.apiKey}`, 'content-type': 'application/json' };
  const body = JSON.stringify({ model, messages: [{ role: 'user', content: `question ${index}` }] });
  const answer = await call(agent, `${edge.url}/v1/chat/completions`, { method: 'POST', headers, body });
  const { status, text, from_ms, to_ms } = answer;
  if (status !== 200) throw new Error(`${status} ${text}`);
  const { maskroute } = JSON.parse(text) as { maskroute: { version: string; mask: string } };
  const named = ['version', 'mask'].map((name) => answer.headers[`x-maskroute-${name}`]).join(' ');
  if (named !== `${maskroute.version} ${maskroute.mask}`) throw new Error(`${named}, but the body: ${text}`);
  return { from_ms, to_ms, ...maskroute };
}

/** Spreads the changes evenly over the requests. */
async function publishMeanwhile(
  publisher: Publisher,
  sending: Sending,
  { requests, changes }: { readonly requests: number; readonly changes: number },
  signal: AbortSignal | undefined,
): Promise<void> {
  for (let done = 1; done < changes && sending.left > 0; done++) {
    while (sending.left > requests * (1 - done / changes)) await sleep(1, undefined, { signal });
    await publisher.change();
  }
}

/** @throws MaskrouteError `invalid_argument` when {@link storeVersions} has fewer distinct masks than `changes`. */
function checkChanges({ model }: MaskSet, changes: number): void {
  const most = (model.blockCount / 2) ** 2;
  if (changes <= most) return;
  throw new MaskrouteError('invalid_argument', `--changes is ${most} at most: each needs a mask of its own.`);
}

/** Stores versions that differ in their masks: each skips another pair of an attention and an FFN block. Version → mask. */
async function storeVersions(
  client: AdminClient,
  preset: MaskSet,
  versions: number,
): Promise<Map<string, string>> {
  const { blockCount } = preset.model;
  const layers = blockCount / 2;
  const maskOf = new Map<string, string>();
  for (let index = 0; index < versions; index++) {
    const skipped = { skipAttention: [index % layers], skipFfn: [Math.floor(index / layers)] };
    const runs = maskFromSkippedLayers(blockCount, skipped);
    const mask = maskId(preset.model.hash as ModelHash, runs);
    const { surrogates: _, ...plain } = preset;
    const set: MaskSet = {
      ...plain,
      surrogate: false,
      name: `bench-${index}`,
      clusters: preset.clusters.map((cluster) => ({ ...cluster, mask, bits: maskBits(runs) })),
    };
    maskOf.set(maskSetVersion(set), mask);
    await storeMaskSet(client, set, '');
  }
  return maskOf;
}

type Publisher = ReturnType<typeof createPublisher>;

/** Publishes at once, publishes in steps, and rolls back, in turn. */
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

/** All versions that were live between a request and its answer; a version is live until the next change is done. */
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

/** A backend that lists the model, and answers each request with the mask and the decision that the request carries. */
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
  return { url: `http://127.0.0.1:${port}`, close: () => void server.close() };
}
