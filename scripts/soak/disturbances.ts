/**
 * Disturbs the product during a soak: every minute a publication for each publisher, every two minutes a killed backend, and
 * two stalls of D1. Returns all disturbances with their times, for the checks.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { publicationSchema } from '../../shared/admin/publication-wire.ts';
import { toMaskrouteError } from '../../shared/wire/errors.ts';
import { isReady, type SoakProduct } from './soak-product.ts';
import { STALL_PATH } from './stallable-d1.ts';

/** From the request to its end, in this machine's time. */
type Span = { readonly begunAt_ms: number; readonly doneAt_ms: number };
type Published = Span & { readonly tenant: string; readonly version: string };

export type Disturbances = {
  readonly publications: readonly Published[];
  /** `doneAt_ms`: when the backend is ready again. */
  readonly kills: readonly Span[];
  readonly stalls: readonly Span[];
};

const PUBLISH_EVERY_ms = 60_000;
const KILL_EVERY_ms = 120_000;
const STALL_ms = 20_000;
/** Begin of each stall, as a share of the duration. In a soak of five minutes, a publication falls into each stall. */
const STALLS_AT = [0.28, 0.68] as const;
const RETRY_ms = 1_000;
const BACK_WITHIN_ms = 60_000;

/** Resolves when all disturbances are over, some seconds before the end. Rejects when `signal` aborts. */
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

/** Publishes a different version for each publisher, so that answers with another publisher's version are noticed. */
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

/** Retries until it succeeds, as D1 may be stalled. A failed attempt may have taken effect. */
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

async function kill({ backends }: SoakProduct, index: number): Promise<Span> {
  const { pid, url } = backends[index]!;
  const victim = pid();
  const begunAt_ms = Date.now();
  if (victim !== undefined) process.kill(victim, 'SIGKILL');
  const isBack = async () => pid() !== undefined && pid() !== victim && (await isReady(url));
  while (!(await isBack())) {
    if (Date.now() - begunAt_ms > BACK_WITHIN_ms) throw new Error(`backend ${index + 1} did not come back`);
    await sleep(100);
  }
  return { begunAt_ms, doneAt_ms: Date.now() };
}

async function stall({ edge }: SoakProduct): Promise<Span> {
  const begunAt_ms = Date.now();
  await fetch(`${edge}${STALL_PATH}?ms=${STALL_ms}`, { method: 'POST' });
  await sleep(STALL_ms);
  return { begunAt_ms, doneAt_ms: Date.now() };
}
