/**
 * What happens to the product during a soak: a publication a minute for each who publishes, a backend killed every two
 * minutes, and D1 stalled twice. What was done is kept with its times, for the checks.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { publicationSchema } from '../../shared/admin/publication-wire.ts';
import { toMaskrouteError } from '../../shared/wire/errors.ts';
import { isReady, type SoakProduct } from './soak-product.ts';
import { STALL_PATH } from './stallable-d1.ts';

/** From when it was asked for until it was done, in this machine's time. */
type Span = { readonly begunAt_ms: number; readonly doneAt_ms: number };
type Published = Span & { readonly tenant: string; readonly version: string };
/** Done when the backend is ready again. */
type Killed = Span & { readonly backend: number };

export type Disturbances = {
  readonly publications: readonly Published[];
  readonly kills: readonly Killed[];
  readonly stalls: readonly Span[];
};

const PUBLISH_EVERY_ms = 60_000;
const KILL_EVERY_ms = 120_000;
const STALL_ms = 20_000;
/** As parts of the whole time. In the form of five minutes a publication falls into each. */
const STALLS_AT = [0.28, 0.68] as const;
const RETRY_ms = 1_000;
const BACK_WITHIN_ms = 60_000;

/** Resolves when all of it is over, some seconds before the time is. Rejects when `signal` aborts, and begins nothing more. */
export async function disturb(
  product: SoakProduct,
  duration_ms: number,
  say: (line: string) => void,
  signal: AbortSignal,
): Promise<Disturbances> {
  const atEach = <T>(times_ms: readonly number[], act: (turn: number) => Promise<T>) =>
    actAtEach(times_ms, act, signal);
  const [publications, kills, stalls] = await Promise.all([
    atEach(times(PUBLISH_EVERY_ms / 2, PUBLISH_EVERY_ms, duration_ms), (turn) => publish(product, turn)),
    atEach(times(KILL_EVERY_ms, KILL_EVERY_ms, duration_ms - KILL_EVERY_ms / 4), (turn) => {
      say(`backend ${(turn % product.backends.length) + 1} is killed`);
      return kill(product, turn % product.backends.length);
    }),
    atEach(
      STALLS_AT.map((part) => part * duration_ms),
      () => {
        say(`D1 answers nothing for ${STALL_ms / 1000} s`);
        return stall(product);
      },
    ),
  ]);
  return { publications: publications.flat(), kills, stalls };
}

const times = (first_ms: number, every_ms: number, end_ms: number): number[] =>
  Array.from(
    { length: Math.max(0, Math.ceil((end_ms - first_ms) / every_ms)) },
    (_, i) => first_ms + i * every_ms,
  );

async function actAtEach<T>(
  times_ms: readonly number[],
  act: (turn: number) => Promise<T>,
  signal: AbortSignal,
): Promise<T[]> {
  const begun_ms = performance.now();
  return await Promise.all(
    times_ms.map(async (time_ms, turn) => {
      await sleep(Math.max(0, time_ms - (performance.now() - begun_ms)), undefined, { signal });
      return await act(turn);
    }),
  );
}

/** Another version for each who publishes, so that the answers of two tenants can be told apart, too. */
async function publish(product: SoakProduct, turn: number): Promise<Published[]> {
  const versions = [...product.maskSets.keys()];
  return await Promise.all(
    product.publishers.map(async (tenant, index) => {
      const version = versions[(turn + 1 + index) % versions.length]!;
      const begunAt_ms = Date.now();
      await activate(product, tenant, version);
      return { tenant, version, begunAt_ms, doneAt_ms: Date.now() };
    }),
  );
}

/** Again until it is done: D1 may be away. Whether a try that failed took hold cannot be known. */
async function activate({ admin }: SoakProduct, tenant: string, version: string): Promise<void> {
  for (;;) {
    try {
      const body = { version, tenant };
      await admin.request({ method: 'POST', path: '/publications', body }, publicationSchema);
      return;
    } catch (error) {
      if (toMaskrouteError(error).code !== 'configuration_unavailable') throw error;
    }
    await sleep(RETRY_ms);
  }
}

async function kill({ backends }: SoakProduct, index: number): Promise<Killed> {
  const { pid, url } = backends[index]!;
  const victim = pid();
  const begunAt_ms = Date.now();
  if (victim !== undefined) process.kill(victim, 'SIGKILL');
  const isBack = async () => pid() !== undefined && pid() !== victim && (await isReady(url));
  while (!(await isBack())) {
    if (Date.now() - begunAt_ms > BACK_WITHIN_ms) throw new Error(`backend ${index + 1} did not come back`);
    await sleep(100);
  }
  return { backend: index + 1, begunAt_ms, doneAt_ms: Date.now() };
}

async function stall({ edge }: SoakProduct): Promise<Span> {
  const begunAt_ms = Date.now();
  await fetch(`${edge}${STALL_PATH}?ms=${STALL_ms}`, { method: 'POST' });
  await sleep(STALL_ms);
  return { begunAt_ms, doneAt_ms: Date.now() };
}
