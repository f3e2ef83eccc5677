/** Formats answers for OpenAI's Responses API: a `response` object, or events in the order that the official client expects. */
import type { MaskrouteError } from '../../shared/wire/errors.ts';
import type { FinishReason } from '../../shared/wire/openai.ts';
import { errorEventOf, type ResponsesRequest } from '../../shared/wire/responses.ts';
import type { RunningAnswer } from './answer.ts';
import type { ChoiceEvent } from './choice.ts';
import { sseEvent } from './sse.ts';
import { answerId, infoOf, usageOf } from './wire.ts';

/** The body of a whole answer: the response that ends its stream. Rejects with the choice's error. */
export async function wholeResponse(running: RunningAnswer, request: ResponsesRequest): Promise<object> {
  let last: Event | undefined;
  for await (const event of new ResponseWriter(running, request).events()) last = event;
  return last!.response!;
}

/** An event of a stream. `response`: in the first two events and the last one. */
type Event = { readonly type: string; readonly sequence_number: number; readonly response?: object };

export const eventFrame = (event: Event): string => sseEvent(event.type, event);

type Output = TextOutput | CallOutput;
type Status = 'in_progress' | 'completed' | 'incomplete';
type TextOutput = {
  readonly id: string;
  readonly type: 'message';
  readonly role: 'assistant';
  readonly status: Status;
  readonly content: readonly object[];
};
type CallOutput = {
  readonly id: string;
  readonly type: 'function_call';
  readonly call_id: string;
  readonly name: string;
  readonly arguments: string;
  readonly status: Status;
};

const textPart = (text: string) => ({ type: 'output_text', text, annotations: [], logprobs: [] });
const textOutput = (id: string, text: string | undefined, status: Status): TextOutput => ({
  id,
  type: 'message',
  role: 'assistant',
  status,
  content: text === undefined ? [] : [textPart(text)],
});

/** The `response` object; like OpenAI's it repeats the request's settings. */
function response(
  { plan }: RunningAnswer,
  request: ResponsesRequest,
  status: Status,
  output: readonly Output[],
): object {
  return {
    id: answerId(plan),
    object: 'response',
    created_at: plan.created_s,
    status,
    background: false,
    error: null,
    incomplete_details: null,
    instructions: request.instructions ?? null,
    max_output_tokens: request.max_output_tokens ?? null,
    model: plan.modelName,
    output,
    parallel_tool_calls: request.parallel_tool_calls ?? true,
    previous_response_id: null,
    reasoning: { effort: null, summary: null },
    store: false,
    temperature: request.temperature ?? 1,
    text: request.text ?? { format: { type: 'text' } },
    tool_choice: request.tool_choice ?? 'auto',
    tools: request.tools ?? [],
    top_p: request.top_p ?? 1,
    truncation: 'disabled',
    usage: null,
    metadata: {},
  };
}

function ended(
  running: RunningAnswer,
  request: ResponsesRequest,
  output: readonly Output[],
  reason: FinishReason,
): object {
  const isCut = reason === 'length';
  const { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details } = usageOf(running);
  return {
    ...response(running, request, isCut ? 'incomplete' : 'completed', output),
    ...(isCut ? { incomplete_details: { reason: 'max_output_tokens' } } : {}),
    usage: {
      input_tokens: prompt_tokens,
      input_tokens_details: prompt_tokens_details,
      output_tokens: completion_tokens,
      output_tokens_details: { reasoning_tokens: 0 },
      total_tokens,
    },
    maskroute: infoOf(running),
  };
}

/** The events of a streamed answer. */
export class ResponseWriter {
  readonly #running: RunningAnswer;
  readonly #request: ResponsesRequest;
  readonly #output: Output[] = [];
  #sequence = 0;
  /** The text, or the arguments, of the item that is being written. */
  #written = '';

  constructor(running: RunningAnswer, request: ResponsesRequest) {
    this.#running = running;
    this.#request = request;
  }

  /** The first one comes with the first token: the edge measures that time. Rejects with what the choice throws. */
  async *events(): AsyncGenerator<Event, void> {
    for await (const event of this.#running.events) {
      if (this.#sequence === 0) yield* this.#begin();
      yield* this.#write(event);
    }
  }

  /** A late failure, after what was sent. */
  failure(error: MaskrouteError): Event & { readonly maskroute: object } {
    return { ...errorEventOf(error.toWire(), this.#sequence++), maskroute: infoOf(this.#running) };
  }

  *#begin(): Generator<Event, void> {
    const begun = response(this.#running, this.#request, 'in_progress', []);
    yield this.#event('response.created', { response: begun });
    yield this.#event('response.in_progress', { response: begun });
  }

  *#write(event: ChoiceEvent): Generator<Event, void> {
    switch (event.type) {
      case 'text':
        if (event.text === '') return;
        if (this.#open?.type !== 'message') yield* this.#beginText();
        this.#written += event.text;
        yield this.#event('response.output_text.delta', {
          ...this.#place(),
          content_index: 0,
          delta: event.text,
          logprobs: [],
        });
        return;
      case 'call':
        yield* this.#close('completed');
        yield* this.#beginCall(event.id, event.name);
        return;
      case 'arguments':
        this.#written += event.text;
        yield this.#event('response.function_call_arguments.delta', { ...this.#place(), delta: event.text });
        return;
      case 'finished':
        yield* this.#end(event.reason);
    }
  }

  *#end(reason: FinishReason): Generator<Event, void> {
    if (this.#output.length === 0) yield* this.#beginText();
    yield* this.#close(reason === 'length' ? 'incomplete' : 'completed');
    const name = reason === 'length' ? 'response.incomplete' : 'response.completed';
    yield this.#event(name, { response: ended(this.#running, this.#request, this.#output, reason) });
  }

  *#beginText(): Generator<Event, void> {
    yield* this.#close('completed');
    const nth = this.#output.length === 0 ? '' : `_${this.#output.length}`;
    yield this.#add(textOutput(`msg_${this.#running.plan.id}${nth}`, undefined, 'in_progress'));
    yield this.#event('response.content_part.added', {
      ...this.#place(),
      content_index: 0,
      part: textPart(''),
    });
  }

  *#beginCall(call_id: string, name: string): Generator<Event, void> {
    const id = `fc_${this.#running.plan.id}_${this.#output.length}`;
    yield this.#add({ id, type: 'function_call', call_id, name, arguments: '', status: 'in_progress' });
  }

  #add(item: Output): Event {
    this.#written = '';
    this.#output.push(item);
    return this.#event('response.output_item.added', { output_index: this.#output.length - 1, item });
  }

  *#close(status: Status): Generator<Event, void> {
    const open = this.#open;
    if (open === undefined) return;
    const [place, written] = [this.#place(), this.#written];
    let item: Output;
    if (open.type === 'message') {
      item = textOutput(open.id, written, status);
      const said = { ...place, content_index: 0 };
      yield this.#event('response.output_text.done', { ...said, text: written, logprobs: [] });
      yield this.#event('response.content_part.done', { ...said, part: textPart(written) });
    } else {
      item = { ...open, arguments: written, status };
      const said = { ...place, name: open.name, arguments: written };
      yield this.#event('response.function_call_arguments.done', said);
    }
    this.#output[place.output_index] = item;
    yield this.#event('response.output_item.done', { output_index: place.output_index, item });
  }

  /** The item that is being written, if any. */
  get #open(): Output | undefined {
    return this.#output.find(({ status }) => status === 'in_progress');
  }

  #place(): { item_id: string; output_index: number } {
    return { item_id: this.#output.at(-1)!.id, output_index: this.#output.length - 1 };
  }

  #event(type: string, more: object): Event {
    return { type, sequence_number: this.#sequence++, ...more };
  }
}
