/**
 * A wrapper around the edge's worker, in workerd. On Cloudflare, `waitUntil` work and queues outlive a deployment; here they
 * end with the process. So this worker can be drained: it waits until all work has ended and until a marker message that it
 * sends through each queue has been delivered.
 */

type Context = { waitUntil(work: Promise<unknown>): void };
type Batch = {
  readonly queue: string;
  readonly messages: readonly { readonly body: unknown }[];
  retryAll(options?: object): void;
};
type Env = Readonly<Record<string, { send(mark: string): Promise<unknown> }>>;
type Worker = {
  fetch(request: Request, env: Env, context: Context): Promise<Response> | Response;
  queue(batch: Batch, env: Env, context: Context): Promise<void>;
  scheduled(event: { readonly cron: string }, env: Env, context: Context): Promise<void>;
};

/** The scheduled event that drains: it returns when no work is left. */
export const DRAIN_CRON = 'drain';
const POLL_ms = 20;

/** `queues`: the bindings of the queues that `worker` sends to. */
export function drainable(worker: Worker, queues: readonly string[]): Worker {
  let working = 0;
  /** Markers that are not delivered yet. */
  const marks = new Set<unknown>();

  const counted = async <T>(work: Promise<T>): Promise<T> => {
    working++;
    try {
      return await work;
    } finally {
      working--;
    }
  };
  const held = (context: Context): Context => ({
    waitUntil: (work) => context.waitUntil(counted(work)),
  });
  const until = async (isSo: () => boolean) => {
    while (!isSo()) await new Promise((resolve) => setTimeout(resolve, POLL_ms));
  };

  return {
    fetch: (request, env, context) => worker.fetch(request, env, held(context)),
    async queue(batch, env, context) {
      let isRepeated = false;
      const retryAll: Batch['retryAll'] = (options) => {
        isRepeated = true;
        batch.retryAll(options);
      };
      // Read once: after an `await` workerd may return another object for the same body.
      const bodies = batch.messages.map(({ body }) => body);
      const messages = batch.messages.filter((_, index) => !marks.has(bodies[index]));
      await counted(worker.queue({ queue: batch.queue, messages, retryAll }, env, held(context)));
      // A failed delivery is repeated, and its marker with it.
      if (!isRepeated) for (const body of bodies) marks.delete(body);
    },
    async scheduled(event, env, context) {
      if (event.cron !== DRAIN_CRON) return await worker.scheduled(event, env, held(context));
      await until(() => working === 0);
      for (const queue of queues) {
        const mark = crypto.randomUUID();
        marks.add(mark);
        await env[queue]!.send(mark);
      }
      await until(() => marks.size === 0 && working === 0);
    },
  };
}
