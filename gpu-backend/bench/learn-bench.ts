/**
 * `bench learn`: milliseconds of one training step of the gates, loss and all 2L gradients, with every gate open
 * (the slowest case) and with a quarter of them at 0. Fewer, more and longer sequences show that the cost grows with
 * tokens and no faster. The peer is PyTorch in fp32 and bf16, where Python has it. It steps on the next token, so both
 * are compared by that; `learn` itself steps against the dense model's distributions, and that is measured beside it.
 *
 * The limit is the products: each weight multiplies twice a position, forward and back.
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { type GateBatch, nextTokenBatch } from '../learning/gates/batches.ts';
import { type GateSession, openGateSession } from '../learning/gates/gate-session.ts';
import { openTeacher } from '../learning/gates/teacher.ts';
import { interleaved, rested, round, type Subject } from '../measure.ts';
import type { LlamaConfig } from '../model/model-source.ts';
import { DEFAULT_MODEL, defaultModelFile } from '../model/sources/default-model.ts';
import { openInstalled } from '../model/store.ts';
import { quarterMask, type SpeedOptions } from './decode.ts';

const SEQUENCES = 6;
const TOKENS = 128;
/** PyTorch's threads need as long. */
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

export async function benchLearn({ home, rounds, say }: SpeedOptions): Promise<object> {
  const { folder, manifest } = await openInstalled(home, DEFAULT_MODEL);
  const { config, weights } = manifest;
  const threads = availableParallelism();
  const session = await openGateSession(folder, config, { threads });
  const taught = await openTaught(folder, config, threads);
  const peer = await openTorchPeer(defaultModelFile(home), threads);
  say(peer.problem === null ? `against PyTorch ${peer.version}` : `PyTorch is left out: ${peer.problem}`);
  try {
    const subjects = [...ownSubjects(session, config), taught.subject, ...peer.subjects];
    const found = await interleaved(
      subjects.map((subject) => rested(subject, REST_ms)),
      rounds,
    );
    for (const [name, ms] of found) say(`${name}: ${ms.toFixed(0)} ms/step`);
    const open_ms = found.get(OPEN)!;
    return {
      ...{ bench: 'learn', model: manifest.name, weights },
      msPerStep: round(open_ms, 1),
      quarterAtZero_ms: round(found.get(QUARTER)!, 1),
      distributions_ms: round(found.get(DISTRIBUTIONS)!, 1),
      ...{ sequences: SEQUENCES, tokens: TOKENS, rounds, threads },
      growth: growthOf(found),
      products_GMACps: round((2 * multiplyAdds(config) * SEQUENCES * TOKENS) / open_ms / 1e6, 1),
      ...torchFigures(peer, found),
    };
  } finally {
    peer.close();
    await taught.close();
    await session.close();
  }
}

/** Times the tokens, and times the time, of other sizes of a step. */
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

function ownSubjects(session: GateSession, config: LlamaConfig): Subject[] {
  const open = openGates(session);
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

/** The step of `learn`: 64 targets a position, and all other tokens as one more. */
async function openTaught(folder: string, config: LlamaConfig, threads: number) {
  const teacher = await openTeacher(folder, config, { threads });
  const batch = await teacher.teach(someText(SEQUENCES, TOKENS));
  await teacher.close();
  const session = await openGateSession(folder, config, { threads, tail: true });
  return {
    subject: stepping(DISTRIBUTIONS, session, batch, openGates(session)),
    close: () => session.close(),
  };
}

const sizeName = (sequences: number, tokens: number): string => `${sequences} x ${tokens}`;

const openGates = (session: GateSession): number[] => Array(session.gateCount).fill(1);

/** The peer's ids are made by the same rule. */
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
  async measure() {
    const start = performance.now();
    await session.step(batch, gates);
    return performance.now() - start;
  },
});

/** Multiply-adds of all weights for one position. */
function multiplyAdds(config: LlamaConfig): number {
  const { layerCount, hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D } = config;
  return layerCount * (2 * H * N * D + 2 * H * G * D + 3 * H * F) + H * config.vocabularySize;
}

type TorchPeer = {
  readonly version: string | null;
  /** Why there is no peer to measure. */
  readonly problem: string | null;
  readonly subjects: readonly Subject[];
  close(): void;
};

const noPeer = (problem: string): TorchPeer => ({ version: null, problem, subjects: [], close() {} });

/**
 * Starts Python, which steps when it is told to (`learn-peer.py`). A machine without Python or PyTorch gives a reason
 * and no error.
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
  // A broken pipe shows as the end of its output.
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
