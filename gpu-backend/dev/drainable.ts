/**
 * Runs in workerd, around the edge's worker. On the platform, work that a request leaves behind goes on by itself, and so
 * does what is in a queue. Here both end with the process, so this worker can be told to drain: it answers when all that
 * was held has ended, and when a mark that it sends through each queue has come out.
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
  scheduled?(event: { readonly cron: string }, env: Env, context: Context): Promise<void>;
};

/** A scheduled event by this name returns when nothing is left. */
export const DRAIN_CRON = 'drain';
const POLL_ms = 20;

/** `queues`: the bindings that `worker` sends through. */
export function drainable(worker: Worker, queues: readonly string[]): Required<Worker> {
  let working = 0;
  /** Those that have not come out yet. */
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
      // Read once: in workerd a body is another one when it is read again after a wait.
      const bodies = batch.messages.map(({ body }) => body);
      const messages = batch.messages.filter((_, index) => !marks.has(bodies[index]));
      await counted(worker.queue({ queue: batch.queue, messages, retryAll }, env, held(context)));
      // A delivery that failed comes again, and the mark with it.
      if (!isRepeated) for (const body of bodies) marks.delete(body);
    },
    async scheduled(event, env, context) {
      if (event.cron !== DRAIN_CRON) return await worker.scheduled?.(event, env, held(context));
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
