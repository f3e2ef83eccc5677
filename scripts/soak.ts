/**
 * `npm run soak`: runs the whole product on this machine for half an hour, with 64 clients that stream, ask for whole answers
 * and hang up, while mask sets are published, backends are killed and D1 stalls. Afterwards budgets, usage and events must
 * agree, no answer may mix versions, memory must be flat, and requests may have failed only in documented ways. It writes
 * a page with charts; the last line is JSON, and the exit code is 1 if a check failed.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { availableParallelism, cpus } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';
import { interruptible, share, wholeNumber } from '../gpu-backend/cli/terminal.ts';
import { memoryBelow } from '../gpu-backend/processes.ts';
import { createRandom } from '../gpu-backend/random.ts';
import { budgetUseSchema, listSchema, usageRowSchema } from '../shared/admin/admin-wire.ts';
import { type Outcome, sendTraffic } from './load/clients.ts';
import { type Disturbances, disturb } from './soak/disturbances.ts';
import {
  answersAreCounted,
  answersOf,
  booksAgree,
  type Check,
  type CountedEvent,
  failuresAreDeclared,
  growthOf,
  type MemorySample,
  memoryIsFlat,
  noVersionIsMixed,
  seenSpans,
  type TenantBooks,
} from './soak/soak-checks.ts';
import { EDGE_V8_FLAGS, type SoakProduct, startSoakProduct } from './soak/soak-product.ts';

type Options = Record<'minutes' | 'clients' | 'hangUps' | 'rate' | 'seed', number> & {
  readonly out: string;
  readonly page?: string;
};

/** The shortest run in which processes are warm long enough to check their memory. */
const MINUTES_MIN = 3;

const {
  minutes: MINUTES,
  clients: CLIENTS,
  hangUps: HANG_UPS,
  rate: RATE,
  ...options
} = parseScript<Options>(
  newCommand(
    'npm run soak --',
    'everything at once for half an hour: streams, hang-ups, publications, killed backends, a stalled D1; then the books must agree',
  )
    .option('--minutes <count>', 'how long, 3 at least; 5 is the short form', wholeNumber(MINUTES_MIN), 30)
    .option('--clients <count>', 'clients at once', wholeNumber(1), 64)
    .option('--hang-ups <share>', 'share of requests whose client hangs up', share, 0.2)
    .option('--rate <count>', 'max requests/s of each client', wholeNumber(1), 1)
    .option('--seed <number>', 'the same seed sends the same requests', wholeNumber(0), 1)
    .option('--out <folder>', 'where soak.html, soak.json, memory.json and edge.log are written', 'soak')
    .option('--page <file>', 'where the page is written (default: soak.html in that folder)'),
  ['npm run soak -- --page docs/measured/soak.html', 'npm run soak -- --minutes 5 --out /tmp/soak'],
);
const SECONDS = MINUTES * 60;
const DAY_ms = 86_400_000;

/** Waits until after midnight (UTC) if the soak would reach it: daily budgets are reset then, and could not be compared. */
async function awaitOneDay(signal: AbortSignal): Promise<void> {
  const left_ms = DAY_ms - (Date.now() % DAY_ms);
  if (left_ms > SECONDS * 1000 + 5 * 60_000) return;
  console.log('It is nearly midnight (UTC), when daily budgets are reset: the soak starts after that.');
  await sleep(left_ms + 1000, undefined, { signal });
}

/** Samples the memory of all processes every second, until `over` aborts. */
async function watchMemory(over: AbortSignal): Promise<MemorySample[]> {
  const samples: MemorySample[] = [];
  const begun_ms = performance.now();
  while (!over.aborted) {
    const at_s = (performance.now() - begun_ms) / 1000;
    for (const part of memoryBelow(process.pid)) {
      // This process runs the clients, which are not part of the product.
      if (part.pid !== process.pid && part.rss_MB > 0) samples.push({ at_s, ...part });
    }
    await sleep(1000, undefined, { signal: over }).catch(() => undefined);
  }
  return samples;
}

/* The books (budgets, usage and events), read when they do not change any more. */

/** Longer than the edge's questions for costs of broken answers, and than the retry of a failed delivery of events. */
const QUIET_ms = 60_000;
const QUIET_WITHIN_ms = 300_000;

async function settledBooks(product: SoakProduct, signal: AbortSignal): Promise<TenantBooks[]> {
  const deadline_ms = Date.now() + QUIET_WITHIN_ms;
  let last = await readBooks(product);
  let since_ms = Date.now();
  while (Date.now() - since_ms < QUIET_ms && Date.now() < deadline_ms) {
    await sleep(2_500, undefined, { signal });
    const books = await readBooks(product);
    if (JSON.stringify(books) !== JSON.stringify(last)) since_ms = Date.now();
    last = books;
  }
  return last;
}

async function readBooks({ admin, tenants }: SoakProduct): Promise<TenantBooks[]> {
  const usage = await admin.request(
    { method: 'GET', path: '/usage?group=tenant' },
    listSchema(usageRowSchema),
  );
  return await Promise.all(
    tenants.map(async ({ id, hasBooks }) => {
      const row = usage.data.find(({ tenant }) => tenant === id);
      const { requests = 0, prompt_tokens = 0, completion_tokens = 0 } = row ?? {};
      const budget = { method: 'GET', path: `/tenants/${id}/budget` } as const;
      const limits = hasBooks ? await admin.request(budget, listSchema(budgetUseSchema)) : undefined;
      const day = limits?.data.find(({ unit, window }) => unit === 'tokens' && window === 'day');
      const budget_tokens = day?.used ?? null;
      return { tenant: id, requests, prompt_tokens, completion_tokens, budget_tokens };
    }),
  );
}

/** Events of the soak's tenants, from D1's file. */
function readEvents({ database, tenants }: SoakProduct): CountedEvent[] {
  const file = new DatabaseSync(database, { readOnly: true, timeout: 5_000 });
  try {
    const columns = 'request_id, tenant, version, mask, status, prompt_tokens, completion_tokens';
    const rows = file.prepare(`SELECT ${columns} FROM events WHERE requests = 1`).all();
    const ours = new Set<unknown>(tenants.map(({ id }) => id));
    return (rows as unknown as CountedEvent[]).filter(({ tenant }) => ours.has(tenant));
  } finally {
    file.close();
  }
}

type Seen = {
  readonly outcomes: readonly Outcome[];
  readonly disturbances: Disturbances;
  readonly memory: readonly MemorySample[];
  readonly books: readonly TenantBooks[];
  readonly events: readonly CountedEvent[];
};

function checksOf({ publishers, maskSets, live }: SoakProduct, seen: Seen): Check[] {
  const answers = answersOf(seen.outcomes);
  const own = (tenant: string) => (publishers.includes(tenant) ? tenant : '');
  const firstOfAll = seen.disturbances.publications.find(({ tenant }) => tenant === '')?.version;
  const spans = new Map(
    publishers.map((publisher) => {
      // Until a tenant publishes, it sees the default mask set, which is also published at that time.
      const first = publisher === '' || firstOfAll === undefined ? [live] : [live, firstOfAll];
      return [publisher, seenSpans(seen.disturbances, publisher, first)] as const;
    }),
  );
  return [
    booksAgree(seen.books, seen.events),
    answersAreCounted(answers, seen.events),
    noVersionIsMixed(answers, (tenant) => spans.get(own(tenant))!, maskSets),
    failuresAreDeclared(seen.outcomes, seen.disturbances),
    memoryIsFlat(seen.memory),
  ];
}

async function soak(
  product: SoakProduct,
  signal: AbortSignal,
): Promise<{ begunAt_ms: number; sent: number; seen: Seen }> {
  const begunAt_ms = Date.now();
  const ended = new AbortController();
  // If one part fails, the others end, too.
  const over = AbortSignal.any([signal, ended.signal]);
  const at = () => `${((Date.now() - begunAt_ms) / 60_000).toFixed(1)} min`;
  const watching = watchMemory(over);
  const [{ sent, outcomes }, disturbances] = await Promise.all([
    sendTraffic({
      edge: product.edge,
      model: product.model,
      tenants: product.tenants,
      clients: CLIENTS,
      seconds: SECONDS,
      rate: RATE,
      hangUps: HANG_UPS,
      random: createRandom(options.seed),
      signal: over,
    }),
    disturb(product, SECONDS * 1000, (line) => console.log(`${at()}: ${line}`), over),
  ]).finally(() => ended.abort());
  const memory = await watching;
  console.log(`${at()}: the clients have ended; waiting until usage and budgets do not change any more`);
  const books = await settledBooks(product, signal);
  return { begunAt_ms, sent, seen: { outcomes, disturbances, memory, books, events: readEvents(product) } };
}

async function main(signal: AbortSignal): Promise<void> {
  const folder = path.resolve(options.out);
  const pageFile = path.resolve(options.page ?? path.join(folder, 'soak.html'));
  // Made before half an hour of work, since it may fail.
  for (const needed of [folder, path.dirname(pageFile)]) await mkdir(needed, { recursive: true });
  await awaitOneDay(signal);
  const product = await startSoakProduct((line) => console.log(line));
  try {
    console.log(
      `${CLIENTS} clients for ${MINUTES} minutes at ${product.edge}, ${product.backends.length} backends`,
    );
    const { begunAt_ms, sent, seen } = await soak(product, signal);
    const checks = checksOf(product, seen);
    const settings = [
      ['clients', `${CLIENTS}, each asks ${RATE} times a second at most`],
      ['hang-ups', `${(100 * HANG_UPS).toFixed(0)} % of requests`],
      ['tenants', product.tenants.map(({ id }) => id).join(', ')],
      ['backends', String(product.backends.length)],
      ['model', product.model],
      ['began', new Date(begunAt_ms).toISOString()],
      ['machine', `${availableParallelism()} cores, ${cpus()[0]?.model ?? 'unknown'}`],
      ["the edge's V8", EDGE_V8_FLAGS],
    ] as const;
    const { outcomes, disturbances, memory } = seen;
    // Charts take half a second to load.
    const { errorCounts, soakPage } = await import('./soak/soak-page.ts');
    const page = soakPage({ begunAt_ms, seconds: SECONDS, settings, outcomes, disturbances, memory, checks });
    await writeFile(pageFile, page);
    for (const { name, isKept, detail } of checks) console.log(`${isKept ? '✔' : '✖'} ${name}: ${detail}`);
    const isKept = checks.every((check) => check.isKept);
    const figures = {
      minutes: MINUTES,
      clients: CLIENTS,
      sent,
      answers: answersOf(outcomes).length,
      hangUps: outcomes.filter(({ result }) => result.kind === 'hang-up').length,
      errors: Object.fromEntries(errorCounts(outcomes)),
      memory: growthOf(memory),
      checks: Object.fromEntries(checks.map((check) => [check.name, check.isKept])),
    };
    const text = JSON.stringify({ ...figures, isKept });
    await writeFile(path.join(folder, 'soak.json'), `${text}\n`);
    await writeFile(path.join(folder, 'memory.json'), `${JSON.stringify(memory)}\n`);
    console.log(text);
    process.exitCode = isKept ? 0 : 1;
  } finally {
    await product.stop(folder);
  }
}

await interruptible(main).catch(sayError);
