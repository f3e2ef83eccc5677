/** A module around the edge's worker of a soak, in workerd, that stalls D1 on request. */
import { interceptedD1 } from '../../test/support/intercepted-d1.ts';

/** `POST` to this path with `?ms=` stalls D1 for so many milliseconds. */
export const STALL_PATH = '/soak/stall';

type Env = { readonly DB: object };
type Handler<Event> = (event: Event, env: Env, context: object) => unknown;
type Worker = {
  readonly fetch: Handler<Request>;
  readonly queue: Handler<object>;
  readonly scheduled: Handler<object>;
};

let until_ms = 0;

/** Queries during a stall are answered after it, as by a database that hangs. */
async function ask(question: () => unknown): Promise<unknown> {
  while (Date.now() < until_ms) await new Promise((resolve) => setTimeout(resolve, until_ms - Date.now()));
  return await question();
}

/** One stallable environment for each `env`, as the worker keeps its services by environment. */
const stallable = new WeakMap<Env, Env>();
function withStalls(env: Env): Env {
  const known = stallable.get(env) ?? { ...env, DB: interceptedD1(env.DB, ask) };
  stallable.set(env, known);
  return known;
}

export default (worker: Worker): Worker => ({
  fetch(request, env, context) {
    const url = new URL(request.url);
    if (url.pathname !== STALL_PATH) return worker.fetch(request, withStalls(env), context);
    until_ms = Date.now() + Number(url.searchParams.get('ms'));
    return new Response('It stalls.\n');
  },
  queue: (batch, env, context) => worker.queue(batch, withStalls(env), context),
  scheduled: (event, env, context) => worker.scheduled(event, withStalls(env), context),
});
