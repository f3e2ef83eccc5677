/**
 * The time of one training step, and of a learning run on several workers.
 *
 * `bench learn`: milliseconds of one training step of the gates (the loss and all 2L gradients), with all gates open (the
 * slowest case) and with a quarter of them at 0. Other counts and lengths of sequences show that the time grows linearly
 * with tokens. The peer is PyTorch in fp32 and bf16, if Python has it. Both are compared with next-token targets; `learn`
 * trains on the dense model's distributions, which is measured too.
 *
 * The limit is the products: each weight multiplies twice a position, forward and backward.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { denseMask } from '../../shared/mask/mask.ts';
import { batchSamples, type GateBatch, nextTokenBatch } from '../learning/gates/batches.ts';
import { type GateSession, openGateSession } from '../learning/gates/gate-session.ts';
import { fastestRounding } from '../learning/gates/rounding.ts';
import { weightCounts } from '../learning/gates/step-memory.ts';
import { openTeacher } from '../learning/gates/teacher.ts';
import { learn, MASK_SET_FILE } from '../learning/learn.ts';
import { LEARN_EFFORT, type LearnEffort } from '../learning/search/effort.ts';
import { openQueuedUnits } from '../learning/units/queued-units.ts';
import { batchUnit, scoreUnit, type Unit } from '../learning/units/unit.ts';
import type { OpenUnits } from '../learning/units/units.ts';
import { type BenchHooks, interleaved, round, type Subject, time_ms } from '../measure.ts';
import type { ModelConfig } from '../model/model-source.ts';
import { DEFAULT_MODEL, defaultModelFile } from '../model/sources/resolve.ts';
import { openInstalled } from '../model/store.ts';
import { installedSurrogates } from '../model/surrogates.ts';
import { endChild } from '../processes.ts';
import { createRandom } from '../random.ts';
import { quarterMask, type SpeedOptions } from './decode.ts';
import { startValkey, type Valkey } from './valkey-server.ts';

const SEQUENCES = 6;
const TOKENS = 128;
/** A pause before each measurement: PyTorch's idle threads spin for about that long. */
const REST_ms = 500;
const OPEN = 'all gates open';
const QUARTER = 'a quarter of the gates at 0';
const DISTRIBUTIONS = "all gates open, the dense model's distributions for targets";
/** Sequences and tokens of each. */
const OTHER_SIZES = [
  [3, 128],
  [12, 128],
  [6, 256],
] as const;
const SCRIPT = fileURLToPath(new URL('./learn-peer.py', import.meta.url));
const readySchema = z.object({ torch: z.string(), transformers: z.string() });
const stepSchema = z.object({ ms: z.number(), loss: z.number() });

const rested = ({ name, measure }: Subject): Subject => ({
  name,
  async measure() {
    await sleep(REST_ms);
    return await measure();
  },
});

export async function benchLearn({ home, rounds, say, signal }: SpeedOptions): Promise<object> {
  const { folder, manifest } = await openInstalled(home, DEFAULT_MODEL);
  const { config, weights } = manifest;
  const threads = availableParallelism();
  const session = await openGateSession(folder, config, { threads });
  const taught = await openTaught(folder, config, threads);
  const peer = await openTorchPeer(defaultModelFile(home), threads);
  say(peer.problem === null ? `against PyTorch ${peer.version}` : `PyTorch is left out: ${peer.problem}`);
  try {
    const subjects = [...ownSubjects(session, config), taught.subject, ...peer.subjects];
    const found = await interleaved(subjects.map(rested), rounds, signal);
    for (const [name, ms] of found) say(`${name}: ${ms.toFixed(0)} ms/step`);
    const open_ms = found.get(OPEN)!;
    return {
      bench: 'learn',
      model: manifest.name,
      weights,
      msPerStep: round(open_ms, 1),
      quarterAtZero_ms: round(found.get(QUARTER)!, 1),
      distributions_ms: round(found.get(DISTRIBUTIONS)!, 1),
      sequences: SEQUENCES,
      tokens: TOKENS,
      rounds,
      threads,
      growth: growthOf(found),
      products_GMACps: round((2 * weightCounts(config).all * SEQUENCES * TOKENS) / open_ms / 1e6, 1),
      ...torchFigures(peer, found),
    };
  } finally {
    peer.close();
    await taught.close();
    await session.close();
  }
}

/** Tokens and time of steps of other sizes, relative to the default step. */
const growthOf = (found: ReadonlyMap<string, number>): object =>
  Object.fromEntries(
    OTHER_SIZES.map(([sequences, tokens]) => [
      sizeName(sequences, tokens),
      {
        tokens: round((sequences * tokens) / (SEQUENCES * TOKENS), 2),
        time: round(found.get(sizeName(sequences, tokens))! / found.get(OPEN)!, 2),
      },
    ]),
  );

function torchFigures({ version, problem }: TorchPeer, found: ReadonlyMap<string, number>): object {
  if (problem !== null) return { torch: null, torchProblem: problem };
  const [open_ms, fp32_ms, bf16_ms] = [OPEN, 'fp32', 'bf16'].map((name) => found.get(name)!) as [
    number,
    number,
    number,
  ];
  return {
    torch: version,
    torchFp32_ms: round(fp32_ms, 1),
    torchBf16_ms: round(bf16_ms, 1),
    timesTorchFp32: round(fp32_ms / open_ms, 2),
    timesTorchBf16: round(bf16_ms / open_ms, 2),
  };
}

function ownSubjects(session: GateSession, config: ModelConfig): Subject[] {
  const open = openGates(config);
  const subject = (name: string, gates: ArrayLike<number>, sequences = SEQUENCES, tokens = TOKENS): Subject =>
    stepping(name, session, someText(sequences, tokens), gates);
  return [
    subject(OPEN, open),
    subject(QUARTER, quarterMask(config.layerCount).runs),
    ...OTHER_SIZES.map(([sequences, tokens]) =>
      subject(sizeName(sequences, tokens), open, sequences, tokens),
    ),
  ];
}

/** The step of `learn`: the dense model's 64 likeliest tokens of each position, and all other tokens as one more target. */
async function openTaught(folder: string, config: ModelConfig, threads: number) {
  const teacher = await openTeacher(folder, config, { threads });
  const batch = await teacher.teach(someText(SEQUENCES, TOKENS));
  await teacher.close();
  const session = await openGateSession(folder, config, { threads, tail: true });
  return {
    subject: stepping(DISTRIBUTIONS, session, batch, openGates(config)),
    close: () => session.close(),
  };
}

const sizeName = (sequences: number, tokens: number): string => `${sequences} x ${tokens}`;

const openGates = ({ layerCount }: ModelConfig): number[] => Array(2 * layerCount).fill(1);

/** The rule of `learn-peer.py`, so that both compute the same ids. */
const someText = (sequences: number, tokens: number): GateBatch =>
  nextTokenBatch(
    Array.from({ length: sequences * tokens }, (_, i) => 100 + ((i * 7919) % 40000)),
    sequences,
  );

const stepping = (
  name: string,
  session: GateSession,
  batch: GateBatch,
  gates: ArrayLike<number>,
): Subject => ({
  name,
  measure: () => time_ms(() => session.step(batch, gates)),
});

type TorchPeer = {
  readonly version: string | null;
  /** Why PyTorch is not measured; null when it is. */
  readonly problem: string | null;
  readonly subjects: readonly Subject[];
  close(): void;
};

const noPeer = (problem: string): TorchPeer => ({ version: null, problem, subjects: [], close() {} });

/**
 * Starts `learn-peer.py`, which computes a step for each line that it gets. Without Python or PyTorch, `problem` says why;
 * nothing is thrown.
 */
async function openTorchPeer(file: string, threads: number): Promise<TorchPeer> {
  if (!existsSync(file)) return noPeer("the model's GGUF file is not there");
  const python = spawn('python3', [SCRIPT, file, `${SEQUENCES}`, `${TOKENS}`, `${threads}`], {
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  let errors = '';
  python.stderr.on('data', (chunk) => {
    errors = `${errors}${chunk}`.slice(-2000);
  });
  python.on('error', (error) => {
    errors = error.message;
  });
  // A broken pipe is noticed as the end of Python's output.
  python.stdin.on('error', () => {});
  const lines = createInterface({ input: python.stdout })[Symbol.asyncIterator]();
  const ready = await lines.next();
  if (ready.done) return noPeer(errors.trim().split('\n').at(-1) || 'python3 ended without a word');
  const { torch } = readySchema.parse(JSON.parse(ready.value));
  const subject = (name: string): Subject => ({
    name,
    async measure() {
      python.stdin.write(`${name}\n`);
      const line = await lines.next();
      if (line.done) throw new Error(`PyTorch's side ended: ${errors.trim().split('\n').at(-1)}`);
      return stepSchema.parse(JSON.parse(line.value)).ms;
    },
  });
  const subjects = [subject('fp32'), subject('bf16')];
  return { version: torch, problem: null, subjects, close: () => python.stdin.end() };
}

/*
 * `bench learn-many`: a small learning run of the default model on two workers with a thread each, against the same run on
 * one. The queue's server, the workers and the journal are real; each run begins with an empty journal. Workers open the
 * model before the time is taken. Both runs must give the same mask set, byte by byte.
 */

type LearnManyOptions = BenchHooks & { readonly home: string };

const PROGRAM = fileURLToPath(new URL('../../bin/maskroute.js', import.meta.url));
const ROWS = 120;
/** A small run: one mask, on a single batch of text, with about the same mix of units as `learn`. */
const EFFORT: LearnEffort = {
  ...LEARN_EFFORT,
  one: {
    ...LEARN_EFFORT.one,
    searchPositions: 500,
    glanceParts: 1,
    greedyEvaluations: 24,
    gateSteps: 10,
    rounds: 0,
    exchanges: 6,
    triesMax: 3,
  },
  choicePositions: 1000,
  heldOutPositions: 600,
};

export async function benchLearnMany({ home, say, signal }: LearnManyOptions): Promise<object> {
  const model = await openInstalled(home, DEFAULT_MODEL);
  const surrogates = await installedSurrogates(model);
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-learn-many-'));
  await using server = await startValkey();
  try {
    const data = join(folder, 'rows.jsonl');
    await writeFile(data, someRows().join('\n'));
    const measure = async (workers: number): Promise<Measured> => {
      const out = join(folder, `out-${workers}`);
      const journal = join(folder, `units-${workers}`);
      await using machines = startWorkers(workers, server, journal, home);
      const open = openQueuedUnits({ url: server.url, journal, say });
      const rounding = await fastestRounding();
      await warmUp(open, workers, { model, surrogates, threads: 1, rounding, signal });
      const before = machines.units();
      const learning = () =>
        learn({
          model,
          surrogates,
          data: { files: [data] },
          encoder: 'static',
          clusterCount: 1,
          budget: { sparsity: 0.25, cost: 'blocks' },
          search: { effort: EFFORT },
          machine: { home, threads: 1, openUnits: open },
          output: { folder: out, name: 'bench' },
          seed: 1,
          hooks: { onProgress: () => {}, onDownload: () => {}, log: say, signal },
        });
      const took_s = (await time_ms(learning)) / 1000;
      const units = machines.units() - before;
      say(`${workers} ${workers === 1 ? 'worker' : 'workers'}: ${took_s.toFixed(1)} s for ${units} units`);
      return { took_s, units, set: await readFile(join(out, MASK_SET_FILE), 'utf8') };
    };
    const one = await measure(1);
    const two = await measure(2);
    if (one.set !== two.set) throw new Error('two workers came to another mask set than one');
    return {
      bench: 'learn-many',
      model: model.manifest.name,
      weights: model.manifest.weights,
      units: one.units,
      threadsOfEach: 1,
      oneWorker_s: round(one.took_s, 1),
      twoWorkers_s: round(two.took_s, 1),
      times: round(one.took_s / two.took_s, 2),
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

type Measured = { readonly took_s: number; readonly units: number; readonly set: string };

type Workers = AsyncDisposable & { units(): number };

function startWorkers(count: number, { url }: Valkey, journal: string, home: string): Workers {
  const args = ['work', '--queue', url, '--journal', journal, '--threads', '1', '--json'];
  let units = 0;
  const children = Array.from({ length: count }, (): ChildProcess => {
    const child = spawn(process.execPath, [PROGRAM, ...args], {
      stdio: ['ignore', 'pipe', 'ignore'],
      env: { ...process.env, MASKROUTE_HOME: home },
    });
    createInterface({ input: child.stdout! }).on('line', () => units++);
    return child;
  });
  return {
    units: () => units,
    async [Symbol.asyncDispose]() {
      await Promise.all(children.map((child) => endChild(child, 'SIGTERM')));
    },
  };
}

/** Gives every worker a unit of each kind, so that it opens all its sessions. */
async function warmUp(open: OpenUnits, workers: number, options: Parameters<OpenUnits>[0]): Promise<void> {
  await using units = await open(options);
  const gates = openGates(options.model.manifest.config);
  for (const kind of ['loss', 'step', 'score'] as const) {
    // As many units as workers at a time, so that each worker takes one.
    await Promise.all(
      Array.from({ length: workers }, (_, seed) => units.run(warmUpUnit(kind, 500 + seed, gates))),
    );
  }
}

function warmUpUnit(kind: Unit['kind'], seed: number, gates: readonly number[]): Unit {
  const length = kind === 'score' ? 64 : 256;
  const tokenIds = Int32Array.from({ length }, (_, i) => 100 + ((seed + 7919 * i) % 40_000));
  const sample = { tokenIds, scoreFrom: 0 };
  return kind === 'score'
    ? scoreUnit(sample, [denseMask(gates.length)])
    : batchUnit(kind, 'dense', batchSamples([sample], length)[0]!, gates);
}

/** Random sentences; the time does not depend on what they say. */
function someRows(): string[] {
  const words =
    'the a blue old train house walks sings near under quickly bread river answer to of and'.split(' ');
  const random = createRandom(7);
  return Array.from({ length: ROWS }, () => {
    const text = Array.from({ length: 40 }, () => words[random.below(words.length)]).join(' ');
    return JSON.stringify({ text });
  });
}
