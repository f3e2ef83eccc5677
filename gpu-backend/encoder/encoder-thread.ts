/**
 * The encoder's worker thread; a run of the graph would block the main thread. Jobs take turns of some tokens each, so
 * that a single prompt of an edge does not wait for a job of a thousand texts.
 */
import { parentPort, workerData } from 'node:worker_threads';
import type { EncoderSpec } from '../../shared/mask/mask-set.ts';
import { nextTurn } from '../event-loop.ts';
import { loadSentenceEncoder } from './sentence-encoder.ts';

export type EncoderStart = { readonly id: string; readonly folder: string };

export type ToEncoder =
  | { readonly type: 'embed'; readonly job: number; readonly texts: readonly string[] }
  | { readonly type: 'cancel'; readonly job: number }
  | { readonly type: 'close' };

export type FromEncoder =
  | { readonly type: 'ready'; readonly spec: EncoderSpec }
  /** `vectors`: `[texts, dimensions]`, row-major. `tokens`: of all texts, special ones included. */
  | { readonly type: 'done'; readonly job: number; readonly vectors: Float32Array; readonly tokens: number }
  | { readonly type: 'failed'; readonly job: number; readonly detail: string };

/** Tokens of one turn, some tens of milliseconds: a new job waits at most that long for each job before it. */
const TOKENS_A_TURN = 512;

const start = workerData as EncoderStart;
const port = parentPort!;
const send = (message: FromEncoder, transfer: ArrayBuffer[] = []): void =>
  port.postMessage(message, transfer);

type Job = {
  readonly job: number;
  readonly texts: readonly string[];
  readonly vectors: Float32Array;
  done: number;
  tokens: number;
};

// One thread is enough: a prompt is embedded within milliseconds, and the engine needs the cores.
const encoder = await loadSentenceEncoder(start.id, start.folder, 1);
const { dimensions } = encoder.spec;
/** The queue, by the jobs' numbers: the first job runs, and keeps its place meanwhile. */
const line = new Map<number, Job>();
let running = false;

port.on('message', (message: ToEncoder) => {
  switch (message.type) {
    case 'embed': {
      const { job, texts } = message;
      const vectors = new Float32Array(texts.length * dimensions);
      line.set(job, { job, texts, vectors, done: 0, tokens: 0 });
      if (!running) void run();
      return;
    }
    case 'cancel':
      line.delete(message.job);
      return;
    case 'close':
      // Ends this thread alone, between two runs of the graph.
      process.exit();
  }
});

const first = (): Job | undefined => line.values().next().value;

async function run(): Promise<void> {
  running = true;
  for (let job = first(); job !== undefined; job = first()) {
    const { job: id, texts, vectors } = job;
    try {
      await turn(job);
      // A cancelled job is not there any more.
      const isWanted = line.delete(id);
      if (isWanted && job.done < texts.length) line.set(id, job);
      else if (isWanted)
        send({ type: 'done', job: id, vectors, tokens: job.tokens }, [vectors.buffer as ArrayBuffer]);
    } catch (error) {
      line.delete(id);
      send({ type: 'failed', job: id, detail: (error as Error).stack ?? String(error) });
    }
    // Lets messages in: new jobs and cancellations.
    await nextTurn();
  }
  running = false;
}

async function turn(job: Job): Promise<void> {
  const texts: string[] = [];
  for (let tokens = 0; job.done + texts.length < job.texts.length; ) {
    const text = job.texts[job.done + texts.length]!;
    const count = encoder.tokenCount(text);
    if (texts.length > 0 && tokens + count > TOKENS_A_TURN) break;
    tokens += count;
    job.tokens += count;
    texts.push(text);
  }
  const vectors = await encoder.embed(texts);
  vectors.forEach((vector, i) => {
    job.vectors.set(vector, (job.done + i) * dimensions);
  });
  job.done += texts.length;
}

send({ type: 'ready', spec: encoder.spec });
