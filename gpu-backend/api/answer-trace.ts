/** The span of an answer, within the edge's trace, with child spans for queueing, prefill and decode of its choices. */
import { type Attributes, type Context, type Span, SpanKind, type Tracer } from '@opentelemetry/api';
import {
  answerAttributes,
  contextWith,
  decisionAttributes,
  operationOf,
  type ReadHeader,
  requestAttributes,
  setOutcome,
  spanName,
  traceOf,
} from '../../shared/tracing/traces.ts';
import type { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ChatRequest, CompletionRequest } from '../../shared/wire/openai.ts';
import type { RunningAnswer } from './answer.ts';
import { computedTokens, type Progress } from './choice.ts';
import type { Endpoint } from './plan.ts';
import { answerId, usageOf } from './wire.ts';

/** Most choices of an answer with spans of their own. */
const TRACED_CHOICES_MAX = 8;

const epoch_ms = (at_ms: number): number => performance.timeOrigin + at_ms;

/** All times that it takes are `performance.now()`. */
export class AnswerTrace {
  readonly #tracer: Tracer;
  readonly #span: Span;
  readonly #context: Context;
  readonly #operation: ReturnType<typeof operationOf>;
  readonly #arrivedAt_ms: number;

  constructor(tracer: Tracer, endpoint: Endpoint, header: ReadHeader, arrivedAt_ms: number) {
    const parent = traceOf(header);
    const operation = operationOf(endpoint);
    const attributes: Attributes = { 'gen_ai.operation.name': operation };
    const options = { kind: SpanKind.SERVER, startTime: epoch_ms(arrivedAt_ms), attributes };
    this.#tracer = tracer;
    this.#operation = operation;
    this.#arrivedAt_ms = arrivedAt_ms;
    this.#span = tracer.startSpan(operation, options, parent);
    this.#context = contextWith(parent, this.#span);
  }

  asked(requestId: string, body: ChatRequest | CompletionRequest): void {
    const attributes = requestAttributes(this.#operation, body);
    this.#span.setAttributes({ ...attributes, 'maskroute.request_id': requestId });
  }

  /** `running` is undefined for a request that was refused before it ran. Calls after the first do nothing. */
  end(running: RunningAnswer | undefined, error: MaskrouteError | undefined): void {
    if (!this.#span.isRecording()) return;
    const now_ms = performance.now();
    if (running !== undefined) {
      const { plan, progress, firstEventAt_ms } = running;
      this.#span.updateName(spanName(this.#operation, plan.modelName));
      this.#span.setAttributes({
        ...decisionAttributes(plan.route, plan.mask.id, plan.mask.sparsity),
        ...answerAttributes(factsOf(running, this.#arrivedAt_ms)),
      });
      if (firstEventAt_ms !== undefined) this.#span.addEvent('first_token', epoch_ms(firstEventAt_ms));
      progress.slice(0, TRACED_CHOICES_MAX).forEach((choice, index) => {
        this.#traceChoice(choice, index, now_ms);
      });
    }
    setOutcome(this.#span, error?.status ?? 200, error?.code ?? null);
    this.#span.end(epoch_ms(now_ms));
  }

  /** An aborted choice has no timings; its decode span begins with its first token. */
  #traceChoice({ timings, finishedAt_ms, ...choice }: Progress, index: number, now_ms: number): void {
    const attributes = { 'maskroute.choice': index };
    const part = (name: string, from_ms: number, to_ms: number, more: Attributes = {}) => {
      const options = { startTime: epoch_ms(from_ms), attributes: { ...attributes, ...more } };
      this.#tracer.startSpan(name, options, this.#context).end(epoch_ms(to_ms));
    };
    const decoded = { 'gen_ai.usage.output_tokens': computedTokens(choice) };
    if (timings === undefined || finishedAt_ms === undefined) {
      const { firstTokenAt_ms } = choice;
      if (firstTokenAt_ms !== undefined) part('decode', firstTokenAt_ms, now_ms, decoded);
      return;
    }
    const prefilled_ms = finishedAt_ms - timings.decode_ms;
    const begun_ms = prefilled_ms - timings.prefill_ms;
    part('queue', begun_ms - timings.queue_ms, begun_ms);
    part('prefill', begun_ms, prefilled_ms, {
      'gen_ai.usage.cache_read.input_tokens': choice.cachedTokens,
    });
    part('decode', prefilled_ms, finishedAt_ms, decoded);
  }
}

function factsOf(running: RunningAnswer, arrivedAt_ms: number): Parameters<typeof answerAttributes>[0] {
  const { prompt_tokens, completion_tokens, prompt_tokens_details } = usageOf(running);
  const { plan, progress, firstEventAt_ms } = running;
  return {
    id: answerId(plan),
    input_tokens: prompt_tokens,
    output_tokens: completion_tokens,
    cached_tokens: prompt_tokens_details.cached_tokens,
    finishReasons: progress.flatMap(({ finishReason }) => finishReason ?? []),
    first_ms: plan.stream && firstEventAt_ms !== undefined ? firstEventAt_ms - arrivedAt_ms : undefined,
  };
}
