/**
 * `npm run demo`: sends prompts of several kinds to a running `npm start` (or to a product that the demo starts), with the
 * official client. For each prompt it prints the cluster, the mask, and answers and speeds with that mask and dense; then
 * a summary.
 */
import { availableParallelism, loadavg } from 'node:os';
import { APIConnectionError, APIError, OpenAI } from 'openai';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';
import { computingThreads, interruptible, JSON_OPTION } from '../gpu-backend/cli/terminal.ts';
import { type DevFile, readDevFile } from '../gpu-backend/dev/dev-home.ts';
import { createStep, startProduct } from '../gpu-backend/dev/product.ts';
import { maskrouteHome } from '../gpu-backend/files.ts';
import { average, median } from '../gpu-backend/measure.ts';
import { createAdminClient, createTenantClient } from '../gpu-backend/publication/admin-client.ts';
import { livePublication } from '../gpu-backend/publication/publish.ts';
import { DEFAULT_TENANT, listSchema } from '../shared/admin/admin-wire.ts';
import { evaluatedRowSchema } from '../shared/admin/stats-wire.ts';
import { MaskrouteError } from '../shared/wire/errors.ts';
import { dryRunSchema } from '../shared/wire/openai.ts';
import { HEADERS } from '../shared/wire/protocol.ts';

const ANSWER_TOKENS_MAX = 64;
const ROUNDS = 3;
const COLUMNS_MAX = 120;

const PROMPTS = [
  ['math', 'A baker sells 12 loaves a day at 3 dollars each. How much does she earn in a week?'],
  ['code', 'Write a Python function that returns the n-th Fibonacci number.'],
  [
    'common sense',
    'To keep milk fresh for longer, should I put it in the fridge or on the window sill? Why?',
  ],
  ['dialogue', 'Hi! I would like to book a table for two at an Italian restaurant tonight at 7 pm.'],
  ['encyclopedia', 'Describe the history of the Roman aqueducts.'],
  ['Spanish', '¿Cuál es la capital de Francia y por qué es famosa?'],
  ['writing', 'Write a short poem about the sea in autumn.'],
] as const;
const GAP = '  │  ';

async function main(): Promise<void> {
  const { json } = parseScript<{ json: boolean }>(
    newCommand('npm run demo --', 'prompts of several kinds, masked and dense, and a summary').option(
      ...JSON_OPTION,
    ),
    ['npm run demo', 'npm run demo -- --json'],
  );
  const say = json ? console.error : console.log;
  const home = maskrouteHome();
  await interruptible(async (signal) => {
    const dev = await readDevFile(home);
    if (dev !== undefined && (await isRunning(dev))) return demo(dev, json, signal);
    say('No "npm start" is running; starting one for the demo.');
    const product = await startProduct({
      home,
      port: 0,
      backendPort: 0,
      threads: computingThreads(),
      say,
      step: createStep(json ? process.stderr : process.stdout),
      signal,
    });
    await demo(product.dev, json, signal).finally(() => product.stop());
  });
}

async function isRunning(dev: DevFile): Promise<boolean> {
  return fetch(`${dev.edge}/healthz`).then(
    (response) => response.ok,
    () => false,
  );
}

async function demo(dev: DevFile, json: boolean, signal: AbortSignal): Promise<void> {
  const compared: Compared[] = [];
  const client = new OpenAI({ baseURL: `${dev.edge}/v1`, apiKey: dev.apiKey });
  const columns = Math.min(process.stdout.columns ?? COLUMNS_MAX, COLUMNS_MAX);
  // The first answer after a start is slow, as caches are cold, so it is not shown.
  await ask(client, dev.model, 'Hello!', signal);
  for (const [kind, prompt] of PROMPTS) {
    const both = await askBoth(client, dev.model, prompt, signal);
    compared.push(both);
    if (!json) await show(dev, kind, prompt, both, columns);
  }
  const load = loadavg()[0]! / availableParallelism();
  const figures = figuresOf(compared, load, await evaluatedAgreement(dev));
  const dashboard = `${dev.edge}/dashboard`;
  if (json) {
    const prompts = PROMPTS.map(([kind, prompt], index) => ({ kind, prompt, ...compared[index] }));
    console.log(JSON.stringify({ ...figures, dashboard, prompts }));
    return;
  }
  console.log(`\n${'═'.repeat(columns)}\n${summaryOf(figures)}`);
  console.log(`\nMore on this: ${dashboard}`);
}

async function show(
  dev: DevFile,
  kind: string,
  prompt: string,
  { masked, dense }: Compared,
  columns: number,
): Promise<void> {
  const speed = ({ tokens_per_s }: Answer) =>
    tokens_per_s === null ? 'one token' : `${tokens_per_s.toFixed(1)} tokens/s`;
  console.log(`\n${'═'.repeat(columns)}\n${kind}: ${prompt}`);
  console.log(`cluster ${masked.cluster} (${await labelOf(dev, prompt)}), mask ${masked.mask}`);
  const left = `MASKED, ${(masked.sparsity * 100).toFixed(1)} % of blocks skipped, ${speed(masked)}`;
  const right = `DENSE, ${speed(dense)}`;
  for (const line of sideBySide(`${left}\n\n${masked.text}`, `${right}\n\n${dense.text}`, columns)) {
    console.log(line);
  }
}

type Answer = {
  readonly text: string;
  readonly cluster: string;
  readonly mask: string;
  readonly sparsity: number;
  /** See {@link decodeSpeed}. */
  readonly tokens_per_s: number | null;
};

/** The agreement of the live mask set with dense from its stored evaluation; undefined when there is none. */
async function evaluatedAgreement({ edge, adminKey }: DevFile): Promise<number | undefined> {
  const client = createAdminClient(edge, adminKey);
  const live = await livePublication(client, DEFAULT_TENANT);
  if (live === undefined) return undefined;
  const path = `/mask-sets/${live.version}/evaluation`;
  const { data } = await client.request({ method: 'GET', path }, listSchema(evaluatedRowSchema));
  return data.find(({ method, maskSet }) => method === 'learned' && maskSet === live.version)?.agreement;
}

type Compared = {
  readonly masked: Answer;
  readonly dense: Answer;
  /** Tokens a second of every round whose answers have a speed, masked and dense in turns. */
  readonly speeds: readonly { readonly masked: number; readonly dense: number }[];
};

/** Asks masked and dense in turns, so that a busy machine slows both. The fastest answer of each is shown; texts are equal. */
async function askBoth(
  client: OpenAI,
  model: string,
  prompt: string,
  signal: AbortSignal,
): Promise<Compared> {
  const masked: Answer[] = [];
  const dense: Answer[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    masked.push(await ask(client, model, prompt, signal));
    dense.push(await ask(client, `${model}:dense`, prompt, signal));
  }
  const fastest = (answers: Answer[]): Answer =>
    answers.reduce((best, one) => ((one.tokens_per_s ?? 0) > (best.tokens_per_s ?? 0) ? one : best));
  const speeds = masked.flatMap(({ tokens_per_s }, round) => {
    const other = dense[round]!.tokens_per_s;
    return tokens_per_s === null || other === null ? [] : [{ masked: tokens_per_s, dense: other }];
  });
  return { masked: fastest(masked), dense: fastest(dense), speeds };
}

/** If rounds of the same prompt differ by more, other programs disturb the measurement. */
const SPREAD_MAX = 1.25;
/** The load average per core above which the machine counts as busy. */
const LOAD_MAX = 1.5;

type Figures = {
  readonly prompts: number;
  readonly rounds: number;
  /** Medians over all rounds; null when no round has a speed, as all answers have one token. */
  readonly masked_tokens_per_s: number | null;
  readonly dense_tokens_per_s: number | null;
  /** The share of the dense answer's words before the masked answer first differs; the mean over prompts. */
  readonly agreement: number;
  /** The evaluated agreement of the live mask set on held-out text; null when there is no evaluation. */
  readonly evaluated_agreement: number | null;
  /** Fastest round divided by slowest round of a prompt, the median over prompts: 1.1 is 10 %. Null without speeds. */
  readonly spread: number | null;
  /** Load average per core. */
  readonly load: number;
  readonly is_busy: boolean;
};

/** @param load load average per core. */
export function figuresOf(compared: readonly Compared[], load: number, evaluated?: number): Figures {
  const rounds = compared.flatMap(({ speeds }) => speeds);
  const timed = compared.filter(({ speeds }) => speeds.length > 0);
  const spread = medianOrNull(
    timed.flatMap(({ speeds }) =>
      (['masked', 'dense'] as const).map((kind) => {
        const values = speeds.map((speed) => speed[kind]);
        return Math.max(...values) / Math.min(...values);
      }),
    ),
  );
  return {
    prompts: compared.length,
    rounds: ROUNDS,
    masked_tokens_per_s: medianOrNull(rounds.map((round) => round.masked)),
    dense_tokens_per_s: medianOrNull(rounds.map((round) => round.dense)),
    agreement: average(compared.map((one) => agreementOf(one.masked.text, one.dense.text))),
    evaluated_agreement: evaluated ?? null,
    spread,
    load,
    is_busy: (spread ?? 1) > SPREAD_MAX || load > LOAD_MAX,
  };
}

/** The summary's lines; the last lines warn when the machine is busy. */
export function summaryOf(figures: Figures): string {
  const { evaluated_agreement: evaluated } = figures;
  return [
    `Summary of ${figures.prompts} prompts, ${figures.rounds} rounds each, masked and dense in turns:`,
    ...speedLines(figures),
    `  agreement  ${(figures.agreement * 100).toFixed(0)} % of the words before an answer first differs from dense (mean)`,
    ...(evaluated === null
      ? []
      : [
          `  evaluated  ${(evaluated * 100).toFixed(0)} % of next tokens are the same as dense, on text that the masks were not made on`,
        ]),
    ...(figures.is_busy ? busyLines(figures) : []),
  ].join('\n');
}

function speedLines({ masked_tokens_per_s: masked, dense_tokens_per_s: dense }: Figures): string[] {
  if (masked === null || dense === null) {
    return ['  speed      not measured: no prompt got more than one token both masked and dense'];
  }
  const change = (masked / dense - 1) * 100;
  return [
    `  masked     ${masked.toFixed(1)} tokens/s (median)`,
    `  dense      ${dense.toFixed(1)} tokens/s (median); masked is ${Math.abs(change).toFixed(0)} % ${change < 0 ? 'slower' : 'faster'}`,
  ];
}

function busyLines({ spread, load }: Figures): string[] {
  const rounds =
    spread === null
      ? ''
      : `rounds of one prompt differ by ${((spread - 1) * 100).toFixed(0)} % (median), and `;
  return [
    `  The machine is busy: ${rounds}${load.toFixed(1)} programs`,
    '  want each core. Do not trust these speeds; run it again when nothing else runs.',
  ];
}

const medianOrNull = (values: readonly number[]): number | null =>
  values.length === 0 ? null : median(values);

/** The share of the dense answer's words, from its beginning, that the other answer has, too. */
export function agreementOf(text: string, dense: string): number {
  const [words, denseWords] = [text, dense].map((answer) => answer.split(/\s+/).filter(Boolean)) as [
    string[],
    string[],
  ];
  if (denseWords.length === 0) return words.length === 0 ? 1 : 0;
  const differs = denseWords.findIndex((word, at) => word !== words[at]);
  return (differs === -1 ? denseWords.length : differs) / denseWords.length;
}

/** Tokens a second. The first token comes from the prefill, so an answer of one token has no speed: null. */
export const decodeSpeed = (tokens: number, decode_ms: number): number | null =>
  tokens > 1 && decode_ms > 0 ? ((tokens - 1) * 1000) / decode_ms : null;

async function ask(client: OpenAI, model: string, prompt: string, signal: AbortSignal): Promise<Answer> {
  const { data, response } = await client.chat.completions
    .create(
      {
        model,
        messages: [{ role: 'user', content: prompt }],
        max_completion_tokens: ANSWER_TOKENS_MAX,
        temperature: 0,
      },
      { signal },
    )
    .withResponse()
    .catch((error: Error) => {
      if (!(error instanceof APIError)) throw error;
      const said = error instanceof APIConnectionError ? ' gives no answer' : '';
      throw new MaskrouteError('edge_unreachable', `${client.baseURL}${said}: ${error.message}`);
    });
  const { decode_ms } = (data as unknown as { maskroute: { decode_ms: number } }).maskroute;
  const header = (name: string): string => response.headers.get(name) ?? '';
  return {
    text: data.choices[0]?.message.content ?? '',
    cluster: header(HEADERS.cluster),
    mask: header(HEADERS.mask),
    sparsity: Number(header(HEADERS.sparsity)),
    tokens_per_s: decodeSpeed(data.usage!.completion_tokens, decode_ms),
  };
}

/** The label of the prompt's cluster in the mask set. */
async function labelOf({ edge, apiKey, model }: DevFile, prompt: string): Promise<string> {
  const body = { model, messages: [{ role: 'user', content: prompt }] };
  const client = createTenantClient(edge, apiKey);
  const { label } = await client.request(
    { method: 'POST', path: '/route', body, isDryRun: true },
    dryRunSchema,
  );
  return label ?? 'no label';
}

/** Two texts in two columns, wrapped at words. Widths are counted in characters, so wide characters are not aligned. */
export function sideBySide(left: string, right: string, columns: number): string[] {
  const width = Math.max(10, Math.floor((columns - GAP.length) / 2));
  const [leftLines, rightLines] = [wrap(left, width), wrap(right, width)];
  return Array.from({ length: Math.max(leftLines.length, rightLines.length) }, (_, row) =>
    `${(leftLines[row] ?? '').padEnd(width)}${GAP}${rightLines[row] ?? ''}`.trimEnd(),
  );
}

/** Lines of at most `width` characters with their paragraph's indentation; longer words are cut. */
export function wrap(text: string, width: number): string[] {
  return text.split('\n').flatMap((paragraph) => {
    const indent = paragraph.match(/^ */)![0].slice(0, width / 2);
    const lines: string[] = [];
    let line = '';
    for (const word of paragraph
      .trim()
      .split(/ +/)
      .flatMap((word) => cut(word, width - indent.length))) {
      if (line !== '' && indent.length + line.length + 1 + word.length > width) {
        lines.push(indent + line);
        line = word;
      } else line = line === '' ? word : `${line} ${word}`;
    }
    return [...lines, line === '' ? '' : indent + line];
  });
}

function cut(word: string, width: number): string[] {
  const characters = [...word];
  const parts: string[] = [];
  for (let start = 0; start === 0 || start < characters.length; start += width) {
    parts.push(characters.slice(start, start + width).join(''));
  }
  return parts;
}

if (import.meta.main) await main().catch(sayError);
