/**
 * The thread that encodes requests' text to token ids, and its messages. The main thread (`text-service.ts`) starts each
 * turn; it decides whose turn it is, and terminates a turn that does not end.
 */
import { parentPort, workerData } from 'node:worker_threads';
import { type ErrorCode, MaskrouteError } from '../../../shared/wire/errors.ts';
import type { ChatMessage, Tool } from '../../../shared/wire/openai.ts';
import { type ModelText, openModelText, type TextManifest } from './model-text.ts';
import type { TokenTable } from './token-bytes.ts';
import type { ToolFormat } from './tool-format.ts';

/** `tokensMax`: most tokens of a prompt; a longer prompt is not encoded to its end. */
export type TextJob = { readonly tokensMax: number } & (
  | {
      readonly type: 'chat';
      readonly messages: readonly ChatMessage[];
      /** The tools that the prompt describes. */
      readonly tools?: readonly Tool[];
    }
  | {
      readonly type: 'prompts';
      readonly texts: readonly string[];
      readonly addSpecial: boolean;
      readonly parseSpecial: boolean;
    }
);

export type TextThreadStart = { readonly folder: string; readonly manifest: TextManifest };

export type ToTextThread =
  /** `job` comes with a job's first turn. */
  | { readonly type: 'turn'; readonly id: number; readonly job: TextJob | undefined }
  | { readonly type: 'drop'; readonly id: number };

export type FromTextThread =
  | { readonly type: 'ready'; readonly table: TokenTable; readonly toolFormat: ToolFormat }
  | { readonly type: 'turned'; readonly tokens: number; readonly outcome: TurnOutcome };

/** The `tokens` of its message: the tokens of all prompts of the job so far. */
type TurnOutcome =
  | { readonly type: 'paused' }
  | { readonly type: 'encoded'; readonly prompts: readonly Int32Array[] }
  /** A prompt has more than `tokensMax` tokens. */
  | { readonly type: 'too_long' }
  | {
      readonly type: 'refused';
      readonly code: ErrorCode;
      readonly message: string;
      readonly param: string | null;
    }
  | { readonly type: 'failed'; readonly detail: string };

/** The length of a turn: a prompt waits at most that long for each tenant before it. Short prompts take much less. */
const TURN_ms = 5;

/** Encodes all prompts in steps, which yield the tokens so far. Returns the ids; undefined when a prompt is too long. */
function* promptSteps(text: ModelText, job: TextJob): Generator<number, Int32Array[] | undefined> {
  const all =
    job.type === 'chat'
      ? [text.chatSteps(job.messages, job.tools)]
      : job.texts.map((prompt) => text.tokenizer.encodeSteps(prompt, job));
  const prompts: Int32Array[] = [];
  let before = 0;
  for (const steps of all) {
    for (;;) {
      const { done, value } = steps.next();
      const tokens = done ? value.length : value;
      yield before + tokens;
      if (tokens > job.tokensMax) return undefined;
      if (!done) continue;
      prompts.push(value);
      before += tokens;
      break;
    }
  }
  return prompts;
}

type Running = { readonly steps: Generator<number, Int32Array[] | undefined>; tokens: number };

function turn(running: Running): TurnOutcome {
  const until_ms = performance.now() + TURN_ms;
  try {
    do {
      const { done, value } = running.steps.next();
      if (done) return value === undefined ? { type: 'too_long' } : { type: 'encoded', prompts: value };
      running.tokens = value;
    } while (performance.now() < until_ms);
    return { type: 'paused' };
  } catch (error) {
    if (!(error instanceof MaskrouteError))
      return { type: 'failed', detail: (error as Error).stack ?? String(error) };
    const { code, message, param } = error;
    return { type: 'refused', code, message, param };
  }
}

async function serve(port: NonNullable<typeof parentPort>): Promise<void> {
  const { folder, manifest } = workerData as TextThreadStart;
  const text = await openModelText(folder, manifest);
  const jobs = new Map<number, Running>();
  const send = (message: FromTextThread, transfer: ArrayBuffer[] = []): void =>
    port.postMessage(message, transfer);
  port.on('message', (message: ToTextThread) => {
    const { id } = message;
    if (message.type === 'drop') {
      jobs.delete(id);
      return;
    }
    if (message.job !== undefined) jobs.set(id, { steps: promptSteps(text, message.job), tokens: 0 });
    const running = jobs.get(id)!;
    const outcome = turn(running);
    if (outcome.type !== 'paused') jobs.delete(id);
    const ids = outcome.type === 'encoded' ? outcome.prompts.map(({ buffer }) => buffer as ArrayBuffer) : [];
    send({ type: 'turned', tokens: running.tokens, outcome }, ids);
  });
  send({ type: 'ready', table: text.tokenizer.table, toolFormat: text.toolFormat });
}

if (parentPort !== null) await serve(parentPort);
