/** Prompts as token ids, checked against the model's context before anything is queued. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { MaskrouteError } from '../../shared/errors.ts';
import type { ChatMessage, CompletionRequest } from '../../shared/openai.ts';
import { messageText } from '../../shared/openai.ts';
import { unknownToken } from './sampling.ts';
import type { ServedModel } from './served-model.ts';

export type Prompt = {
  readonly tokenIds: Int32Array;
  /** What `echo` repeats. */
  readonly text: string;
};

/** @throws MaskrouteError `invalid_request`, `context_length_exceeded`. */
export function chatPrompt(model: ServedModel, messages: readonly ChatMessage[]): Prompt {
  refuseLongText(model, messages.map(messageText).join('\n'), 'messages');
  const tokenIds = model.text.encodeChat(messages);
  requireFit(model, tokenIds.length, 1, 'messages');
  return { tokenIds, text: '' };
}

/**
 * One prompt, a list of prompts, or the same in token ids.
 * Rejects with MaskrouteError `invalid_request`, `context_length_exceeded`.
 */
export async function completionPrompts(
  model: ServedModel,
  request: Pick<CompletionRequest, 'prompt' | 'max_tokens'>,
): Promise<Prompt[]> {
  const { prompt } = request;
  const room = request.max_tokens === 0 ? 0 : 1;
  if (typeof prompt === 'string') return [textPrompt(model, prompt, room)];
  if (typeof prompt[0] === 'number') return [idPrompt(model, prompt as number[], room)];
  const prompts: Prompt[] = [];
  for (const one of prompt as (string | number[])[]) {
    prompts.push(typeof one === 'string' ? textPrompt(model, one, room) : idPrompt(model, one, room));
    // Other requests' tokens go out between two long prompts.
    await nextTurn();
  }
  return prompts;
}

function textPrompt(model: ServedModel, text: string, room: number): Prompt {
  refuseLongText(model, text, 'prompt');
  const tokenIds = model.text.encodePrompt(text);
  requireFit(model, tokenIds.length, room, 'prompt');
  return { tokenIds, text };
}

function idPrompt(model: ServedModel, ids: readonly number[], room: number): Prompt {
  requireFit(model, ids.length, room, 'prompt');
  const { vocabularySize } = model.engine.model;
  const unknown = ids.find((id) => id >= vocabularySize);
  if (unknown !== undefined) throw unknownToken('prompt', unknown, vocabularySize);
  const decoder = model.text.createDecoder({ showSpecial: true });
  return {
    tokenIds: Int32Array.from(ids),
    text: ids.map((id) => decoder.push(id)).join('') + decoder.flush(),
  };
}

/** Characters a token that are tokenized before a long text is tokenized whole: ordinary text has about 4. */
const PROBE_CHARS_PER_TOKEN = 6;
/** By how many tokens the cut at the probe's end may change its count. */
const PROBE_SLACK_TOKENS = 64;

/**
 * A text that cannot fit is refused at a bounded cost: tokenizing hundreds of kilobytes would hold up every
 * other request for a second, only to be refused.
 */
function refuseLongText(model: ServedModel, text: string, param: string): void {
  const { contextTokens } = model.engine.model;
  const tokensMin = Math.ceil(Buffer.byteLength(text) / model.text.tokenBytesMax);
  if (tokensMin > contextTokens) throw tooLong(contextTokens, `at least ${tokensMin}`, param);
  const probeChars = contextTokens * PROBE_CHARS_PER_TOKEN;
  if (text.length <= probeChars) return;
  const tokens = model.text.encodePrompt(text.slice(0, probeChars)).length - PROBE_SLACK_TOKENS;
  if (tokens > contextTokens) throw tooLong(contextTokens, `more than ${tokens}`, param);
}

function requireFit(model: ServedModel, tokens: number, room: number, param: string): void {
  const { contextTokens } = model.engine.model;
  if (tokens === 0) {
    throw new MaskrouteError('invalid_request', `${param}: it is empty; this model needs a first token.`, {
      param,
    });
  }
  if (tokens + room > contextTokens) throw tooLong(contextTokens, String(tokens), param);
}

const tooLong = (contextTokens: number, tokens: string, param: string): MaskrouteError =>
  new MaskrouteError(
    'context_length_exceeded',
    `This model's context is ${contextTokens} tokens; the prompt has ${tokens} and leaves no room for an answer.`,
    { param },
  );
