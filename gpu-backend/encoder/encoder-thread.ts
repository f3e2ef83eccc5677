/**
 * The encoder's worker thread: a run of the graph blocks its thread, so requests are answered in another one. Jobs take
 * turns, some tokens a turn: a single prompt that an edge waits for is not behind a thousand.
 */
import { parentPort, workerData } from 'node:worker_threads';
import type { EncoderSpec } from '../../shared/mask/mask-set.ts';
import { loadSentenceEncoder } from './sentence-encoder.ts';

export type EncoderStart = { readonly id: string; readonly folder: string; readonly threads: number };

export type ToEncoder =
  | { readonly type: 'embed'; readonly job: number; readonly texts: readonly string[] }
  | { readonly type: 'cancel'; readonly job: number }
  | { readonly type: 'close' };

export type FromEncoder =
  | { readonly type: 'ready'; readonly spec: EncoderSpec }
  /** `vectors`: `[texts, dimensions]`, row-major. `tokens`: of all texts, special ones included. */
  | { readonly type: 'done'; readonly job: number; readonly vectors: Float32Array; readonly tokens: number }
  | { readonly type: 'failed'; readonly job: number; readonly detail: string };

/** Some tens of milliseconds: the longest that a newcomer waits for each job before it. */
const TOKENS_A_TURN = 512;

const start = workerData as EncoderStart;
const port = parentPort!;
const send = (message: FromEncoder, transfer: ArrayBuffer[] = []): void =>
  port.postMessage(message, transfer);

type Job = {
  readonly job: number;
  readonly texts: readonly string[];
  vectors: Float32Array;
  done: number;
  tokens: number;
};

const encoder = await loadSentenceEncoder(start.id, start.folder, start.threads);
const { dimensions } = encoder.spec;
/** The next to run comes first. */
const line: Job[] = [];
let running = false;

port.on('message', (message: ToEncoder) => {
  switch (message.type) {
    case 'embed': {
      const { job, texts } = message;
      line.push({ job, texts, vectors: new Float32Array(texts.length * dimensions), done: 0, tokens: 0 });
      if (!running) void run();
      return;
    }
    case 'cancel': {
      const index = line.findIndex(({ job }) => job === message.job);
      if (index >= 0) line.splice(index, 1);
      return;
    }
    case 'close':
      // Ends this thread alone, between two runs of the graph.
      process.exit();
  }
});

async function run(): Promise<void> {
  running = true;
  for (let job = line.shift(); job !== undefined; job = line.shift()) {
    try {
      await turn(job);
      if (job.done < job.texts.length) line.push(job);
      else {
        const { job: id, vectors, tokens } = job;
        send({ type: 'done', job: id, vectors, tokens }, [vectors.buffer as ArrayBuffer]);
      }
    } catch (error) {
      send({ type: 'failed', job: job.job, detail: (error as Error).stack ?? String(error) });
    }
    // Lets messages in: newcomers, and those who left.
    await new Promise((resolve) => setImmediate(resolve));
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
