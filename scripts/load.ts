/**
 * `npm run load`: a load test of a real `npm start` over loopback, with autocannon. Half of the requests stream, a share of
 * the clients hangs up at a random moment, and each client sends its next request at once, up to a rate. The memory of
 * every process and the stalls of the backend's HTTP thread are recorded. The last line is JSON; the exit code is 1 for
 * failures other than declared refusals, growing memory, or long stalls.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { setTimeout as sleep } from 'node:timers/promises';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';
import { interruptible, share, wholeNumber } from '../gpu-backend/cli/terminal.ts';
import type { DevFile } from '../gpu-backend/dev/dev-home.ts';
import { average, time_ms } from '../gpu-backend/measure.ts';
import { memoryBelow } from '../gpu-backend/processes.ts';
import { createRandom } from '../gpu-backend/random.ts';
import { createHome, removeHome, type Started, start, stop } from '../test/e2e/product.ts';
import { REFUSALS, sendTraffic } from './load/clients.ts';

/** The shortest run in which memory can be compared. */
const SECONDS_MIN = 10;

// The rate leaves pauses between requests; without them, most answers would be refusals.
const {
  clients: CLIENTS,
  seconds: SECONDS,
  hangUps: HANG_UPS,
  rate: RATE,
  seed,
} = parseScript<Record<'clients' | 'seconds' | 'hangUps' | 'rate' | 'seed', number>>(
  newCommand('npm run load --', 'many clients at a real npm start; the last line is one JSON object')
    .option('--clients <count>', 'clients at once', wholeNumber(1), 200)
    .option('--seconds <count>', 'how long they ask, 10 at least', wholeNumber(SECONDS_MIN), 300)
    .option('--hang-ups <share>', 'share of requests whose client hangs up', share, 0.2)
    .option('--rate <count>', 'max requests/s of each client', wholeNumber(1), 1)
    .option('--seed <number>', 'the same seed sends the same requests', wholeNumber(0), 1),
  ['npm run load', 'npm run load -- --clients 20 --seconds 60'],
);

/** Memory is compared between two spans of this length, which end after the first minute and at the end. */
const SPAN_s = 10;
const FIRST_MINUTE_s = Math.min(60, SECONDS / 2);
const STAND_STILL_MAX_ms = 50;
const GROWTH_MAX = 1.1;
/** The resolution of the histogram behind `nodejs_eventloop_lag_*`: a loop without stalls has delays of that length. */
const LAG_RESOLUTION_ms = 10;

type Counts = Record<string, number>;
const count = (counts: Counts, kind: string): void => {
  counts[kind] = (counts[kind] ?? 0) + 1;
};

type Tally = { sent: number; answers: number; hangUps: number; refusals: Counts; failures: Counts };

async function fire({ edge, apiKey, model }: DevFile, tally: Tally, signal: AbortSignal): Promise<void> {
  const { sent, outcomes } = await sendTraffic({
    edge,
    model,
    tenants: [{ id: 'local', key: apiKey }],
    clients: CLIENTS,
    seconds: SECONDS,
    rate: RATE,
    hangUps: HANG_UPS,
    random: createRandom(seed),
    signal,
  });
  tally.sent = sent;
  for (const { result } of outcomes) {
    if (result.kind === 'answer') tally.answers++;
    else if (result.kind === 'hang-up') tally.hangUps++;
    else count(REFUSALS.includes(result.code) ? tally.refusals : tally.failures, result.code);
  }
}

/* Sampling of memory and stalls. */

type Sample = {
  readonly at_s: number;
  readonly rss_MB: Record<string, number>;
  /** The HTTP thread's longest stall since the last sample; 0 when it did not answer. */
  readonly standStill_ms: number;
};
type Watched = {
  readonly samples: Sample[];
  /** The longest stall by the thread's own work; the rest of a stall is waiting for a core. */
  standStillWork_ms: number;
  ownStandStill_ms: number;
  probe_ms: number;
};

/** Takes a sample every second, until `over` aborts. A part that does not answer counts as a failure. */
async function watch(started: Started, watched: Watched, tally: Tally, over: AbortSignal): Promise<void> {
  const begun_ms = performance.now();
  // Stalls of this process, for comparison: if it stalls too, the machine is the cause.
  const own = monitorEventLoopDelay({ resolution: LAG_RESOLUTION_ms });
  own.enable();
  // Resets the backend's longest stall.
  await longestStandStill(started.dev).catch(() => undefined);
  while (!over.aborted) {
    await sleep(1000, undefined, { signal: over }).catch(() => undefined);
    const standStill_ms = await probe(started.dev, watched).catch(() => {
      count(tally.failures, 'watched_part_is_silent');
      return 0;
    });
    const at_s = (performance.now() - begun_ms) / 1000;
    watched.samples.push({ at_s, rss_MB: memoryOf(started.process.pid!), standStill_ms });
  }
  watched.ownStandStill_ms = own.max / 1e6 - LAG_RESOLUTION_ms;
}

/** Probes edge and backend; returns the HTTP thread's longest stall since the last probe, ms. */
async function probe(dev: DevFile, watched: Watched): Promise<number> {
  const took_ms = await time_ms(async () => (await fetch(`${dev.edge}/healthz`)).arrayBuffer());
  watched.probe_ms = Math.max(watched.probe_ms, took_ms);
  const { whole_ms, work_ms } = await longestStandStill(dev);
  watched.standStillWork_ms = Math.max(watched.standStillWork_ms, work_ms);
  return whole_ms;
}

/** The longest stall since the last scrape; a scrape resets it. */
async function longestStandStill({ backend, backendKey }: DevFile) {
  const headers = { authorization: `Bearer ${backendKey}` };
  const metrics = await (await fetch(`${backend}/metrics`, { headers })).text();
  const gauge_ms = (name: string): number => {
    const value_s = new RegExp(`^${name}\\S* (\\S+)$`, 'm').exec(metrics)?.[1];
    if (value_s === undefined) throw new Error(`the backend's metrics lack ${name}`);
    return Number(value_s) * 1000;
  };
  return {
    whole_ms: gauge_ms('nodejs_eventloop_lag_max_seconds') - LAG_RESOLUTION_ms,
    work_ms: gauge_ms('maskroute_http_thread_longest_work_seconds'),
  };
}

/** Memory of the product's processes, by part. */
function memoryOf(root: number): Record<string, number> {
  const rss_MB: Record<string, number> = {};
  for (const part of memoryBelow(root)) rss_MB[part.name] = (rss_MB[part.name] ?? 0) + part.rss_MB;
  return rss_MB;
}

function memory(samples: readonly Sample[]) {
  const upTo = (end_s: number) => samples.filter(({ at_s }) => at_s <= end_s && at_s > end_s - SPAN_s);
  const of = (name: string, some: readonly Sample[]) =>
    Math.round(average(some.map(({ rss_MB }) => rss_MB[name] ?? 0)));
  const names = Object.keys(samples.at(-1)?.rss_MB ?? {}).sort();
  const byPart = names.map((name) => {
    const afterFirstMinute_MB = of(name, upTo(FIRST_MINUTE_s));
    const atEnd_MB = of(name, upTo(samples.at(-1)!.at_s));
    return [name, { afterFirstMinute_MB, atEnd_MB }] as const;
  });
  const total = (which: 'afterFirstMinute_MB' | 'atEnd_MB') =>
    byPart.reduce((sum, [, part]) => sum + part[which], 0);
  return {
    parts: Object.fromEntries(byPart),
    growth: Number((total('atEnd_MB') / total('afterFirstMinute_MB')).toFixed(3)),
  };
}

async function main(signal: AbortSignal): Promise<void> {
  const home = createHome();
  let running: Started | undefined;
  try {
    running = await start(home);
    const tally: Tally = { sent: 0, answers: 0, hangUps: 0, refusals: {}, failures: {} };
    const watched: Watched = { samples: [], standStillWork_ms: 0, ownStandStill_ms: 0, probe_ms: 0 };
    const over = new AbortController();
    console.log(`${CLIENTS} clients for ${SECONDS} s at ${running.dev.edge}`);
    const watching = watch(running, watched, tally, over.signal);
    await fire(running.dev, tally, signal).finally(() => over.abort());
    await watching;
    signal.throwIfAborted();
    const exit = await stop(running);
    running = undefined;
    if (exit !== 0) count(tally.failures, `stopped_with_${exit}`);
    const { parts, growth } = memory(watched.samples);
    const standStill_ms = Math.round(Math.max(...watched.samples.map((sample) => sample.standStill_ms)));
    // Stalls are listed with their time, as the first seconds are slower: code runs for the first time.
    const stalled = watched.samples.filter((sample) => sample.standStill_ms >= STAND_STILL_MAX_ms);
    const isKept =
      Object.keys(tally.failures).length === 0 && growth <= GROWTH_MAX && standStill_ms < STAND_STILL_MAX_ms;
    const settings = { clients: CLIENTS, seconds: SECONDS, hangUpShare: HANG_UPS, rate: RATE };
    const figures = {
      standStill_ms,
      secondsOver: stalled.map(({ at_s, standStill_ms: stood_ms }) => [
        Math.round(at_s),
        Math.round(stood_ms),
      ]),
      standStillWork_ms: Math.round(watched.standStillWork_ms),
      ownStandStill_ms: Math.round(watched.ownStandStill_ms),
      edgeProbeMax_ms: Math.round(watched.probe_ms),
      memory: parts,
      growth,
    };
    console.log(JSON.stringify({ ...settings, ...tally, ...figures, isKept }));
    process.exitCode = isKept ? 0 : 1;
  } finally {
    if (running !== undefined) await stop(running);
    removeHome(home);
  }
}

await interruptible(main).catch(sayError);
