/** Text and conversations to token ids and back, for one installed model; and the trial of both before a model is imported. */
import { spawn } from 'node:child_process';
import { text } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { ChatMessage, Tool } from '../../../shared/wire/openai.ts';
import { finish } from '../../event-loop.ts';
import { unsupportedModel } from '../model-source.ts';
import {
  type ChatTemplate,
  controlTexts,
  createChatTemplate,
  type TemplateMessage,
} from './chat-template.ts';
import { createTokenReader, tokenTable } from './token-bytes.ts';
import {
  addedTokensOf,
  createTokenizer,
  type EncodeOptions,
  isControl,
  readTokenizerFiles,
  type Tokenizer,
} from './tokenizer.ts';
import { type ToolFormat, templateMessages, toolFormatOf } from './tool-format.ts';

export type ModelText = {
  readonly tokenizer: Tokenizer;
  /** Adds BOS if the model wants one. Special tokens that the text spells are encoded as plain text. */
  encodePrompt(text: string, options?: EncodeOptions): Int32Array;
  /**
   * Applies the chat template, up to where the answer begins; only the template writes control tokens.
   * @throws MaskrouteError `invalid_request`.
   */
  encodeChat(messages: readonly ChatMessage[], tools?: readonly Tool[]): Int32Array;
  /** `encodeChat` in steps, like `Tokenizer.encodeSteps`; the first step renders the template. */
  chatSteps(messages: readonly ChatMessage[], tools?: readonly Tool[]): Generator<number, Int32Array>;
  readonly toolFormat: ToolFormat;
};

/** The fields of a model's manifest that text depends on. */
export type TextManifest = {
  readonly chatTemplate: string | null;
  readonly bosTokenId: number | null;
  readonly eosTokenIds: readonly number[];
};

/** `folder`: the model's folder in the store. */
export async function openModelText(folder: string, manifest: TextManifest): Promise<ModelText> {
  const { json, config } = await readTokenizerFiles(folder);
  return createModelText(json, config, manifest);
}

/** @throws Error when @huggingface/tokenizers cannot read the files, MaskrouteError `unsupported_model`. */
export function createModelText(json: object, config: object, manifest: TextManifest): ModelText {
  const { chatTemplate, bosTokenId, eosTokenIds } = manifest;
  const table = tokenTable(json, addedTokensOf(json));
  const { tokenBytes } = createTokenReader(table);
  const name = (id: number | null | undefined) =>
    id === null || id === undefined ? '' : new TextDecoder().decode(tokenBytes(id));
  const template = createChatTemplate(chatTemplate, { bos: name(bosTokenId), eos: name(eosTokenIds[0]) });
  const names = controlNames(json, template, [bosTokenId, ...eosTokenIds].map(name));
  const tokenizer = createTokenizer(json, config, new Set(names), table);
  const control = controlTexts(names);
  const toolFormat = toolFormatOf(template);
  function* chatSteps(
    messages: readonly ChatMessage[],
    tools: readonly Tool[] = [],
  ): Generator<number, Int32Array> {
    const shown = templateMessages(messages, tools, toolFormat);
    const { text, within } = template.renderApart(shown, toolFormat.isOwn ? tools : [], control);
    // No BOS is added: the template writes it itself if the model wants one.
    return yield* tokenizer.encodeSteps(text, { addSpecial: false, parseSpecial: { within } });
  }
  return {
    tokenizer,
    encodePrompt: tokenizer.encode,
    encodeChat: (messages, tools) => finish(chatSteps(messages, tools)),
    chatSteps,
    toolFormat,
  };
}

/**
 * The control tokens: special tokens of the file, BOS and the ends of answers, and tokens that the template writes between
 * messages, which some files do not mark as special (DeepSeek's `<｜User｜>`). Other added tokens, such as runs of spaces or
 * `</think>`, may come from clients' text, too.
 */
function controlNames(json: object, template: ChatTemplate, ends: readonly string[]): string[] {
  const added = addedTokensOf(json);
  const plain = added.filter((token) => !isControl(token) && token.content.trim() !== '');
  const written = controlTexts(plain.map(({ content }) => content)).pattern;
  const rendered = plain.length === 0 ? [] : PROBES.map((probe) => attempt(template, probe));
  const structural = new Set([...ends, ...rendered.flatMap((text) => text.match(written) ?? [])]);
  return added
    .filter((token) => isControl(token) || (structural.has(token.content) && token.content.trim() !== ''))
    .map(({ content }) => content);
}

/** Conversations that find the tokens between messages. Some templates need alternating roles, or refuse system or tool. */
const PROBES: readonly TemplateMessage[][] = [
  ['user'],
  ['user', 'assistant', 'user'],
  ['system', 'user', 'assistant', 'user'],
  ['user', 'assistant', 'tool'],
].map((roles) => roles.map((role) => ({ role, content: 'a' })));

function attempt(template: ChatTemplate, messages: readonly TemplateMessage[]): string {
  try {
    return template.render(messages);
  } catch {
    return '';
  }
}

/*
 * Tries a model's tokenizer and chat template before the import. Both are untrusted programs (regular expressions, a template
 * language), so they run in a child process with bounded time and memory. A template that never ends is refused here, before it
 * reaches the server. (A worker thread is not enough: running out of memory in a thread can end the whole process.)
 */

/** CPU time, which a busy machine does not lengthen. A trial takes about a second of it. */
const TRIAL_CPU_MAX_ms = 20_000;
/** For a trial that waits for a disk, or hardly gets the CPU. */
const TRIAL_TIMEOUT_ms = 10 * 60_000;
/** Enough for the largest tokenizers (250,000 tokens), and a bound for templates that allocate without end. */
const TRIAL_HEAP_MB = 512;
const REASON_CHARS_MAX = 300;

/** `folder` holds the tokenizer's files. @throws MaskrouteError `unsupported_model`. */
export async function tryModelText(
  folder: string,
  manifest: TextManifest,
  cpuMax_ms: number = TRIAL_CPU_MAX_ms,
): Promise<void> {
  const child = spawn(
    process.execPath,
    [`--max-old-space-size=${TRIAL_HEAP_MB}`, fileURLToPath(import.meta.url), folder, `${cpuMax_ms}`],
    { stdio: ['pipe', 'pipe', 'ignore'], timeout: TRIAL_TIMEOUT_ms, killSignal: 'SIGKILL' },
  );
  // A child that ends early breaks the pipe; its exit status is checked below.
  child.stdin.on('error', () => {});
  const { chatTemplate, bosTokenId, eosTokenIds } = manifest;
  child.stdin.end(JSON.stringify({ chatTemplate, bosTokenId, eosTokenIds }));
  const [reason, status] = await Promise.all([
    text(child.stdout),
    new Promise<number | null>((resolve, reject) => {
      child.once('error', reject);
      child.once('exit', resolve);
    }),
  ]);
  if (status === 0) return;
  const limits = `it takes more than ${cpuMax_ms / 1000} s of CPU time or ${TRIAL_HEAP_MB} MB for a greeting`;
  const said = reason === '' ? limits : reason.slice(0, REASON_CHARS_MAX);
  throw unsupportedModel(`its tokenizer or chat template does not work: ${said}`);
}

/** Texts that must be the same after encoding and decoding. */
const SAMPLES = [
  'Hello, world!  Two spaces,\n\ta tab, 1234567890 and ½.',
  'Ünïcödé ist überall: 漢字, हिन्दी, العربية, 👩‍🚀.',
  'def f(x):\n    return {"a": [x ** 2 for x in range(10)]}  # code\r\n',
];

async function trial(folder: string, manifest: TextManifest): Promise<void> {
  const model = await openModelText(folder, manifest);
  for (const sample of SAMPLES) {
    const back = model.tokenizer.decode(model.tokenizer.encode(sample, { addSpecial: false }));
    if (back !== sample) throw new Error(`${JSON.stringify(sample)} comes back as ${JSON.stringify(back)}`);
  }
  try {
    model.encodeChat([{ role: 'user', content: 'Hello' }]);
  } catch (error) {
    // A template may refuse a conversation.
    if (!(error instanceof MaskrouteError) || error.code !== 'invalid_request') throw error;
  }
}

/** Kills this process once it has used its CPU time. In a thread, since a trial without end leaves no turn to timers. */
function limitCpuTime(cpuMax_ms: number): void {
  const watch = `setInterval(() => {
    const { user, system } = process.cpuUsage();
    if (user + system > ${1000 * cpuMax_ms}) process.kill(process.pid, 'SIGKILL');
  }, 100)`;
  new Worker(watch, { eval: true }).unref();
}

if (import.meta.main) {
  limitCpuTime(Number(process.argv[3]));
  try {
    await trial(process.argv[2]!, JSON.parse(await text(process.stdin)));
  } catch (error) {
    process.stdout.write((error as Error).message);
    process.exitCode = 1;
  }
}
