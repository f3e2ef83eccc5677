/** What a stop waits for. The worker and its queue are scripted, so that a delivery fails when the test wants. */
import { beforeEach, expect, test, vi } from 'vitest';
import { DRAIN_CRON, drainable } from '../../../gpu-backend/dev/drainable.ts';

type Message = { readonly body: unknown };
const worker = {
  fetch: vi.fn(() => new Response('answer')),
  queue: vi.fn<Parameters<typeof drainable>[0]['queue']>(),
  scheduled: vi.fn(async () => {}),
};
const sent: Message[] = [];
const env = { EVENTS: { send: async (body: string) => void sent.push({ body }) } };
const context = { waitUntil: () => {} };
beforeEach(() => {
  vi.resetAllMocks();
  sent.length = 0;
});

const create = () => drainable(worker, ['EVENTS']);
const deliver = (local: ReturnType<typeof create>, messages: readonly Message[]) =>
  local.queue({ queue: 'events', messages, retryAll: () => {} }, env, context);
/** Drains, and says whether it has ended. */
function drain(local: ReturnType<typeof create>) {
  const found = { hasEnded: false };
  const ended = local.scheduled({ cron: DRAIN_CRON }, env, context).then(() => {
    found.hasEnded = true;
  });
  return { found, ended };
}
const marked = () => vi.waitFor(() => expect(sent).toHaveLength(1), 20_000);
const aMoment = () => new Promise((resolve) => setTimeout(resolve, 100));

test('a stop waits for work that a request left behind, and for what that put into the queue', async () => {
  const work = Promise.withResolvers<void>();
  const local = create();
  worker.fetch.mockImplementation(((_request: Request, _env: unknown, held: typeof context) => {
    (held.waitUntil as (work: Promise<unknown>) => void)(work.promise);
    return new Response('answer');
  }) as never);
  await local.fetch(new Request('http://edge.test'), env, context);
  const { found, ended } = drain(local);
  await aMoment();
  expect([found.hasEnded, sent]).toEqual([false, []]);
  work.resolve();
  await marked();
  await aMoment();
  expect(found.hasEnded).toBe(false);
  await deliver(local, [{ body: 'event' }, sent[0]!]);
  await ended;
  // The worker never sees the mark.
  expect(worker.queue.mock.calls[0]![0].messages).toEqual([{ body: 'event' }]);
});

test('a delivery that failed is waited for until it has been counted', async () => {
  const local = create();
  const { found, ended } = drain(local);
  await marked();
  worker.queue.mockImplementationOnce(async (batch) => batch.retryAll());
  await deliver(local, [{ body: 'event' }, sent[0]!]);
  await aMoment();
  expect(found.hasEnded).toBe(false);
  await deliver(local, [{ body: 'event' }, sent[0]!]);
  await ended;
});

test('a body that is another one when it is read again, as in workerd after a wait, is read once', async () => {
  const local = create();
  const { ended } = drain(local);
  await marked();
  let reads = 0;
  const mark = {
    get body() {
      return reads++ === 0 ? sent[0]!.body : {};
    },
  };
  await deliver(local, [{ body: 'event' }, mark]);
  await ended;
});

test('other scheduled work is the worker’s own', async () => {
  await create().scheduled({ cron: '* * * * *' }, env, context);
  expect(worker.scheduled).toHaveBeenCalledOnce();
  expect(sent).toEqual([]);
});
