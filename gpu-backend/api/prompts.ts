/** Prompts as token ids, checked against the model's context before anything is queued. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ChatMessage, CompletionRequest } from '../../shared/wire/openai.ts';
import { messageText } from '../../shared/wire/openai.ts';
import type { TextCall, TextJob } from '../model/tokenizer/text-service.ts';
import { unknownToken } from './plan.ts';
import type { ServedModel } from './served-model.ts';

export type Prompt = {
  readonly tokenIds: Int32Array;
  /** What `echo` repeats. */
  readonly text: string;
};

/** Rejects with MaskrouteError `invalid_request`, `context_length_exceeded`, and what the reading of text does. */
export async function chatPrompt(
  model: ServedModel,
  messages: readonly ChatMessage[],
  call: TextCall,
): Promise<Prompt> {
  refuseLongText(model, messages.map(messageText), 'messages');
  const tokensMax = model.engine.model.contextTokens - 1;
  const [tokenIds] = await encode(model, { type: 'chat', messages, tokensMax }, call, 'messages');
  return { tokenIds: tokenIds!, text: '' };
}

/**
 * One prompt, a list of prompts, or the same in token ids. Special tokens that a text spells out are text, unless the
 * request asks otherwise; ids are what they are. Rejects as `chatPrompt`.
 */
export async function completionPrompts(
  model: ServedModel,
  request: Pick<CompletionRequest, 'prompt' | 'max_tokens' | 'echo' | 'add_special_tokens' | 'parse_special'>,
  call: TextCall,
): Promise<Prompt[]> {
  const tokensMax = model.engine.model.contextTokens - (request.max_tokens === 0 ? 0 : 1);
  const { prompt } = request;
  if (typeof prompt !== 'string' && typeof prompt[0] !== 'string') {
    const several = (typeof prompt[0] === 'number' ? [prompt] : prompt) as number[][];
    return await idPrompts(model, several, tokensMax, request.echo === true);
  }
  const texts = [prompt].flat() as string[];
  for (const text of texts) refuseLongText(model, [text], 'prompt');
  const job = {
    type: 'prompts',
    texts,
    tokensMax,
    addSpecial: request.add_special_tokens !== false,
    parseSpecial: request.parse_special === true,
  } as const;
  const found = await encode(model, job, call, 'prompt');
  return found.map((tokenIds, i) => ({ tokenIds, text: texts[i]! }));
}

async function encode(
  model: ServedModel,
  job: TextJob,
  call: TextCall,
  param: string,
): Promise<readonly Int32Array[]> {
  const encoded = await model.text.encode(job, call);
  if (encoded.type === 'too_long') throw tooLong(model, `more than ${job.tokensMax}`, param);
  if (encoded.prompts.some((tokenIds) => tokenIds.length === 0)) throw empty(param);
  return encoded.prompts;
}

async function idPrompts(
  model: ServedModel,
  prompts: readonly (readonly number[])[],
  tokensMax: number,
  isEchoed: boolean,
): Promise<Prompt[]> {
  const { vocabularySize } = model.engine.model;
  const found: Prompt[] = [];
  for (const ids of prompts) {
    if (ids.length === 0) throw empty('prompt');
    if (ids.length > tokensMax) throw tooLong(model, String(ids.length), 'prompt');
    const unknown = ids.find((id) => id >= vocabularySize);
    if (unknown !== undefined) throw unknownToken('prompt', unknown, vocabularySize);
    found.push({ tokenIds: Int32Array.from(ids), text: isEchoed ? textOf(model, ids) : '' });
    // Other requests' tokens go out between two long prompts.
    if (prompts.length > 1) await nextTurn();
  }
  return found;
}

function textOf(model: ServedModel, ids: readonly number[]): string {
  const decoder = model.text.createDecoder({ showSpecial: true });
  return ids.map((id) => decoder.push(id)).join('') + decoder.flush();
}

/** What has more bytes than the longest tokens could hold needs no reading to be refused. */
function refuseLongText(model: ServedModel, texts: readonly string[], param: string): void {
  const bytes = texts.reduce((sum, text) => sum + Buffer.byteLength(text), 0);
  const tokensMin = Math.ceil(bytes / model.text.tokenBytesMax);
  if (tokensMin > model.engine.model.contextTokens) throw tooLong(model, `at least ${tokensMin}`, param);
}

const empty = (param: string): MaskrouteError =>
  new MaskrouteError('invalid_request', `${param}: it is empty; this model needs a first token.`, { param });

const tooLong = (model: ServedModel, tokens: string, param: string): MaskrouteError =>
  new MaskrouteError(
    'context_length_exceeded',
    `This model's context is ${model.engine.model.contextTokens} tokens; the prompt has ${tokens} and leaves no room for an answer.`,
    { param },
  );
