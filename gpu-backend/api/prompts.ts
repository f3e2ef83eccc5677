/** Prompts as token ids, checked against the model's context before anything is queued. */
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
  const bytes = messages.reduce((sum, message) => sum + Buffer.byteLength(messageText(message)), 0);
  refuseLongText(model, bytes, 'messages');
  let tokenIds: Int32Array;
  try {
    tokenIds = model.text.encodeChat(messages);
  } catch (error) {
    // Templates refuse conversations that they were not written for, and say why.
    const message = `messages: the model's chat template refuses them: ${(error as Error).message}`;
    throw new MaskrouteError('invalid_request', message, { param: 'messages', cause: error });
  }
  requireFit(model, tokenIds.length, 1, 'messages');
  return { tokenIds, text: '' };
}

/**
 * One prompt, a list of prompts, or the same in token ids.
 * @throws MaskrouteError `invalid_request`, `context_length_exceeded`.
 */
export function completionPrompts(
  model: ServedModel,
  request: Pick<CompletionRequest, 'prompt' | 'max_tokens'>,
): Prompt[] {
  const { prompt } = request;
  const room = request.max_tokens === 0 ? 0 : 1;
  if (typeof prompt === 'string') return [textPrompt(model, prompt, room)];
  if (typeof prompt[0] === 'number') return [idPrompt(model, prompt as number[], room)];
  return (prompt as (string | number[])[]).map((one) =>
    typeof one === 'string' ? textPrompt(model, one, room) : idPrompt(model, one, room),
  );
}

function textPrompt(model: ServedModel, text: string, room: number): Prompt {
  refuseLongText(model, Buffer.byteLength(text), 'prompt');
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

/** Megabytes of text would hold up every other request while they are tokenized, only to be refused. */
function refuseLongText(model: ServedModel, bytes: number, param: string): void {
  const { contextTokens } = model.engine.model;
  const tokensMin = Math.ceil(bytes / model.text.tokenBytesMax);
  if (tokensMin > contextTokens) throw tooLong(contextTokens, `at least ${tokensMin}`, param);
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
