/**
 * Formats answers as OpenAI's chat completions and legacy completions, whole or in chunks, with usage. `answer.ts` runs
 * them, `completions.ts` sends them.
 */
import type { MaskrouteError } from '../../shared/wire/errors.ts';
import type {
  ChatLogprobs,
  CompletionLogprobs,
  FinishReason,
  TopLogprob,
  Usage,
} from '../../shared/wire/openai.ts';
import { type MaskrouteInfo, systemFingerprint } from '../../shared/wire/protocol.ts';
import type { RunningAnswer } from './answer.ts';
import { type ChoiceEvent, type ChoiceJob, computedTokens, type Piece } from './choice.ts';
import type { ServedModel, TokenText } from './parts.ts';
import type { AnswerPlan, Endpoint } from './plan.ts';
import { sseData, sseEvent } from './sse.ts';

/** The body of a whole answer. Rejects with the error of the first choice that fails. */
export async function wholeAnswer(model: ServedModel, running: RunningAnswer): Promise<object> {
  const { plan } = running;
  const format = formatOf(plan);
  const choices = (await wholeChoices(running)).map((choice, index) => {
    const logprobs = plan.withLogprobs ? format.logprobs(model.text, choice.pieces) : null;
    return format.whole(index, choice, logprobs);
  });
  return {
    ...envelope(model, plan, format.object),
    choices,
    usage: usageOf(running),
    maskroute: infoOf(running),
  };
}

/** A complete choice. */
type WholeChoice = {
  text: string;
  readonly pieces: Piece[];
  readonly calls: { readonly id: string; readonly name: string; arguments: string }[];
  reason: FinishReason;
};

/** Rejects with the error of the first choice that fails. */
export async function wholeChoices({ plan, events }: RunningAnswer): Promise<WholeChoice[]> {
  const choices = plan.jobs.map((): WholeChoice => ({ text: '', pieces: [], calls: [], reason: 'stop' }));
  for await (const event of events) {
    const choice = choices[event.index]!;
    switch (event.type) {
      case 'text':
        choice.text += event.text;
        // Not spread: a prompt may have more tokens than a call may have arguments.
        for (const piece of event.pieces) choice.pieces.push(piece);
        break;
      case 'call':
        choice.calls.push({ id: event.id, name: event.name, arguments: '' });
        break;
      case 'arguments':
        choice.calls[event.call]!.arguments += event.text;
        break;
      case 'finished':
        choice.reason = event.reason;
    }
  }
  return choices;
}

/** The fields that all chunks of an answer begin with. */
export const chunkHead = (model: ServedModel, plan: AnswerPlan): object =>
  envelope(model, plan, formatOf(plan).chunkObject);

/** The answer as framed chunks, without `[DONE]`. Rejects with the error of the first choice that fails. */
export async function* answerChunks(
  { text }: ServedModel,
  head: object,
  running: RunningAnswer,
): AsyncGenerator<string, void> {
  const { plan } = running;
  const format = formatOf(plan);
  const usage = plan.includeUsage ? { usage: null } : {};
  const chunk = (choice: object, extra: object = {}) =>
    sseData({ ...head, choices: [choice], ...usage, ...extra });
  const opened = new Set<number>();
  let unfinished = plan.jobs.length;
  for await (const event of running.events) {
    const { index } = event;
    const opening = opened.has(index) ? undefined : format.opening(index, plan.jobs[index]!);
    opened.add(index);
    if (opening !== undefined) yield chunk(opening);
    switch (event.type) {
      case 'text': {
        const logprobs = plan.withLogprobs ? format.logprobs(text, event.pieces) : null;
        yield chunk(format.text(index, event.text, logprobs));
        break;
      }
      case 'call':
      case 'arguments':
        yield chunk(callDelta(event));
        break;
      case 'finished': {
        const isLast = --unfinished === 0 && !plan.includeUsage;
        yield chunk(format.finish(index, event.reason), isLast ? { maskroute: infoOf(running) } : {});
      }
    }
  }
  if (plan.includeUsage) yield usageChunk(head, running);
}

/** The frames of a failure after status 200: usage, if the client asked for it, and an `error` event. */
export function* failureFrames(
  head: object,
  running: RunningAnswer,
  error: MaskrouteError,
): Generator<string, void> {
  if (running.plan.includeUsage) yield usageChunk(head, running);
  yield sseEvent('error', { ...error.toWire(), maskroute: infoOf(running) });
}

const usageChunk = (head: object, running: RunningAnswer): string =>
  sseData({ ...head, choices: [], usage: usageOf(running), maskroute: infoOf(running) });

/** Derived from the edge's id for the completion, so that the edge knows the answer's id without reading the answer. */
export const answerId = (plan: AnswerPlan): string =>
  (plan.response === undefined ? formatOf(plan).idPrefix : 'resp_') + plan.id;

const envelope = (model: ServedModel, plan: AnswerPlan, object: string): object => ({
  id: answerId(plan),
  object,
  created: plan.created_s,
  model: plan.modelName,
  system_fingerprint: systemFingerprint(model.engine.model.hash, plan.mask.id),
});

/** The token counts so far, in OpenAI's format. */
export function usageOf({ plan, progress, wasTurnedAway }: RunningAnswer): Usage {
  const predicted = progress.flatMap(({ predicted }) => (predicted?.by === 'client' ? predicted : []));
  let promptTokens = 0;
  let cachedTokens = 0;
  let completionTokens = 0;
  plan.jobs.forEach((job, position) => {
    completionTokens += computedTokens(progress[position]!);
    if (!job.countsPrompt || wasTurnedAway) return;
    promptTokens += job.request.promptTokenIds.length;
    cachedTokens += progress[position]!.cachedTokens;
  });
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
    ...(predicted.length > 0 && {
      completion_tokens_details: {
        accepted_prediction_tokens: predicted.reduce((sum, { accepted }) => sum + accepted, 0),
        rejected_prediction_tokens: predicted.reduce((sum, { rejected }) => sum + rejected, 0),
      },
    }),
  };
}

/** The answer's `maskroute` object. For several choices: the longest time in the queue, sums of prefill and decode. */
export function infoOf(running: RunningAnswer): MaskrouteInfo {
  const { route, mask } = running.plan;
  const { prompt_tokens, completion_tokens } = usageOf(running);
  const timings = running.progress.flatMap((one) => one.timings ?? []);
  const sum = (name: 'prefill_ms' | 'decode_ms') =>
    milliseconds(timings.reduce((total, one) => total + one[name], 0));
  return {
    ...route,
    mask: mask.id,
    sparsity: mask.sparsity,
    queue_ms: milliseconds(Math.max(0, ...timings.map((one) => one.queue_ms))),
    prefill_ms: sum('prefill_ms'),
    decode_ms: sum('decode_ms'),
    prompt_tokens,
    completion_tokens,
  };
}

const milliseconds = (value: number): number => Math.round(value * 1000) / 1000;

type Format = {
  readonly idPrefix: string;
  readonly object: string;
  readonly chunkObject: string;
  logprobs(tokens: TokenText, pieces: readonly Piece[]): object;
  /** The first chunk's choice, or undefined where the format has none. */
  opening(index: number, job: ChoiceJob): object | undefined;
  text(index: number, text: string, logprobs: object | null): object;
  finish(index: number, reason: FinishReason): object;
  whole(index: number, choice: WholeChoice, logprobs: object | null): object;
};

/** A chat chunk's choice with a tool call: first id and name, then pieces of the arguments. */
function callDelta(event: Extract<ChoiceEvent, { type: 'call' | 'arguments' }>): object {
  const head = { index: event.call };
  const call =
    event.type === 'call'
      ? { ...head, id: event.id, type: 'function', function: { name: event.name, arguments: '' } }
      : { ...head, function: { arguments: event.text } };
  return { index: event.index, delta: { tool_calls: [call] }, logprobs: null, finish_reason: null };
}

const legacyChoice = (index: number, text: string, logprobs: object | null, reason: FinishReason | null) => ({
  index,
  text,
  logprobs,
  finish_reason: reason,
});

/** The Responses API has its own format (`responses-wire.ts`). */
const formatOf = ({ endpoint }: AnswerPlan): Format =>
  FORMATS[endpoint === 'completions' ? endpoint : 'chat'];

const wholeCall = ({ id, name, arguments: json }: WholeChoice['calls'][number]) => ({
  id,
  type: 'function',
  function: { name, arguments: json },
});

const FORMATS: Record<Exclude<Endpoint, 'responses'>, Format> = {
  chat: {
    idPrefix: 'chatcmpl-',
    object: 'chat.completion',
    chunkObject: 'chat.completion.chunk',
    logprobs: chatLogprobs,
    opening: (index, { form }) => ({
      index,
      // An answer that only calls tools has no content.
      delta: { role: 'assistant', content: form?.calls === undefined ? '' : null },
      logprobs: null,
      finish_reason: null,
    }),
    text: (index, content, logprobs) => ({ index, delta: { content }, logprobs, finish_reason: null }),
    finish: (index, reason) => ({ index, delta: {}, logprobs: null, finish_reason: reason }),
    whole: (index, { text, calls, reason }, logprobs) => ({
      index,
      message: {
        role: 'assistant',
        content: text === '' && calls.length > 0 ? null : text,
        refusal: null,
        ...(calls.length === 0 ? {} : { tool_calls: calls.map(wholeCall) }),
      },
      logprobs,
      finish_reason: reason,
    }),
  },
  completions: {
    idPrefix: 'cmpl-',
    object: 'text_completion',
    chunkObject: 'text_completion',
    logprobs: completionLogprobs,
    opening: () => undefined,
    text: (index, text, logprobs) => legacyChoice(index, text, logprobs, null),
    finish: (index, reason) => legacyChoice(index, '', null, reason),
    whole: (index, { text, reason }, logprobs) => legacyChoice(index, text, logprobs, reason),
  },
};

/** OpenAI's value for an impossible token, since JSON has no -∞. */
const LOGPROB_MIN = -9999;

const finite = (logprob: number): number => Math.max(logprob, LOGPROB_MIN);

function chatLogprobs(tokens: TokenText, pieces: readonly Piece[]): ChatLogprobs {
  const entry = (tokenId: number, logprob: number): TopLogprob => {
    const bytes = tokens.tokenBytes(tokenId);
    return {
      token: new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes),
      logprob: finite(logprob),
      bytes: [...bytes],
    };
  };
  return {
    content: pieces.flatMap(({ tokenId, logprob }) =>
      logprob === null
        ? []
        : [
            {
              ...entry(tokenId, logprob.logprob),
              top_logprobs: logprob.top.map((top) => entry(top.tokenId, top.logprob)),
            },
          ],
    ),
    refusal: null,
  };
}

/** As in OpenAI's format, the alternatives always include the chosen token: up to N + 1 entries. */
function completionLogprobs(tokens: TokenText, pieces: readonly Piece[]): CompletionLogprobs {
  return {
    tokens: pieces.map((piece) => tokenName(tokens, piece.tokenId)),
    token_logprobs: pieces.map(({ logprob }) => (logprob === null ? null : finite(logprob.logprob))),
    top_logprobs: pieces.map(({ logprob }) => {
      if (logprob === null) return null;
      const names: Record<string, number> = {};
      for (const { tokenId, logprob: value } of [...logprob.top, logprob]) {
        const name = tokenName(tokens, tokenId);
        // Two ids may have the same name; the likelier comes first and counts.
        if (!Object.hasOwn(names, name)) names[name] = finite(value);
      }
      return names;
    }),
    text_offset: pieces.map((piece) => piece.offset_codePoints),
  };
}

/** A token whose bytes are not valid UTF-8 is written `bytes:\xe2\x82`, as OpenAI does. */
function tokenName(tokens: TokenText, tokenId: number): string {
  const bytes = tokens.tokenBytes(tokenId);
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return `bytes:${[...bytes].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('')}`;
  }
}
