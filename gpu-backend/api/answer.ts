/**
 * One HTTP answer from many choices: whole, or as a stream of chunks. Which format it has is `Wire`'s
 * matter; how it reaches the client is the route's.
 */

import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import type { Usage } from '../../shared/wire/openai.ts';
import type { MaskrouteInfo } from '../../shared/wire/protocol.ts';
import { type ChoiceEvent, cancellation, type Progress, runChoice } from './choice.ts';
import type { AnswerPlan, RunningAnswer } from './plan.ts';
import type { ApiLimits, ServedModel } from './served-model.ts';
import { SSE_DONE, sseData, sseError } from './sse.ts';
import type { WholeChoice } from './wire.ts';

/* What an answer cost: tokens as OpenAI counts them, and times. Current while it runs, too. */

export function usageOf({ plan, progress }: Pick<RunningAnswer, 'plan' | 'progress'>): Usage {
  let promptTokens = 0;
  let cachedTokens = 0;
  let completionTokens = 0;
  plan.jobs.forEach((job, position) => {
    const { completionTokens: tokens, cachedTokens: cached } = progress[position]!;
    completionTokens += tokens;
    if (!job.countsPrompt) return;
    promptTokens += job.request.promptTokenIds.length;
    cachedTokens += cached;
  });
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
  };
}

/** Several choices: the longest wait, and the engine's time summed. */
export function infoOf(running: Pick<RunningAnswer, 'plan' | 'progress'>): MaskrouteInfo {
  const { plan, progress } = running;
  const { prompt_tokens, completion_tokens } = usageOf(running);
  const timings = progress.flatMap((one) => one.timings ?? []);
  const sum = (pick: (index: number) => number) =>
    milliseconds(timings.reduce((total, _, index) => total + pick(index), 0));
  return {
    ...plan.route,
    mask: plan.mask.id,
    sparsity: plan.mask.sparsity,
    queue_ms: milliseconds(Math.max(0, ...timings.map((one) => one.queue_ms))),
    prefill_ms: sum((index) => timings[index]!.prefill_ms),
    decode_ms: sum((index) => timings[index]!.decode_ms),
    prompt_tokens,
    completion_tokens,
  };
}

const milliseconds = (value: number): number => Math.round(value * 1000) / 1000;

/*
 * Several streams into one, as their events come. Nothing is read ahead: a stream is asked for its next
 * event only after its last one was taken, so a slow reader slows the streams.
 */

/**
 * Runs at most `atOnce` streams at a time, in order of start. The first that fails ends the whole; leaving
 * the iteration early, or a failure, calls `abandon`, which must make pending streams end.
 */
async function* mergeStreams<Event>(
  starts: readonly (() => AsyncGenerator<Event, void>)[],
  atOnce: number,
  abandon: () => void,
): AsyncGenerator<Event, void> {
  type Turn = { readonly stream: AsyncGenerator<Event, void>; readonly result: IteratorResult<Event, void> };
  const turns = new Map<AsyncGenerator<Event, void>, Promise<Turn>>();
  const ask = (stream: AsyncGenerator<Event, void>) => {
    const turn = stream.next().then((result) => ({ stream, result }));
    // Once the merge is over nobody waits for this turn any more; its failure is then no news.
    turn.catch(() => {});
    // Re-entered at the end of the map, so that a fast stream does not starve the others.
    turns.delete(stream);
    turns.set(stream, turn);
  };
  let started = 0;
  try {
    while (started < starts.length || turns.size > 0) {
      while (turns.size < atOnce && started < starts.length) ask(starts[started++]!());
      const { stream, result } = await Promise.race(turns.values());
      if (result.done) {
        turns.delete(stream);
        continue;
      }
      yield result.value;
      ask(stream);
    }
  } finally {
    if (turns.size > 0) {
      abandon();
      // Not awaited: an engine that hangs must not hold the client's answer.
      for (const stream of turns.keys()) void stream.return().catch(() => {});
    }
  }
}

export function runAnswer(
  model: ServedModel,
  plan: AnswerPlan,
  limits: ApiLimits,
  signal: AbortSignal,
): RunningAnswer {
  const progress = plan.jobs.map(
    (): Progress => ({ completionTokens: 0, cachedTokens: 0, timings: undefined }),
  );
  const abandoned = new AbortController();
  const either = AbortSignal.any([signal, abandoned.signal]);
  const admission = { someoneIsIn: false };
  const answerSince_ms = Date.now();
  const starts = plan.jobs.map(
    ({ request, ...job }, position) =>
      () =>
        onceAdmitted(
          () =>
            runChoice(
              model.engine,
              model.text,
              { ...job, request: { ...request, answerSince_ms } },
              progress[position]!,
              either,
            ),
          admission,
          limits.readmit_ms,
          either,
        ),
  );
  const atOnce = Math.max(1, Math.min(limits.choicesAtOnce, model.engine.stats().queueCapacity));
  return { plan, progress, events: mergeStreams(starts, atOnce, () => abandoned.abort()) };
}

/**
 * A full line refuses a request at its first choice. Once a choice is in, the others ask again instead of
 * failing the whole: the client has been let in. The line knows how old the answer is, so that newcomers do not keep
 * them out.
 */
async function* onceAdmitted(
  start: () => AsyncGenerator<ChoiceEvent, void>,
  admission: { someoneIsIn: boolean },
  limit_ms: number,
  signal: AbortSignal,
): AsyncGenerator<ChoiceEvent, void> {
  const until_ms = Date.now() + limit_ms;
  for (let wait_ms = 20; ; wait_ms = Math.min(2 * wait_ms, 1000)) {
    try {
      for await (const event of start()) {
        admission.someoneIsIn = true;
        yield event;
      }
      return;
    } catch (error) {
      const full = error instanceof MaskrouteError && error.code === 'queue_full';
      if (!full || !admission.someoneIsIn || Date.now() > until_ms) throw error;
    }
    await sleep(wait_ms, undefined, { signal }).catch(() => {
      throw cancellation(signal);
    });
  }
}

/**
 * The whole answer's body, `first` being the already requested first event. Rejects with what the first
 * failing choice throws.
 */
export async function wholeAnswer(
  model: ServedModel,
  running: RunningAnswer,
  first: Promise<IteratorResult<ChoiceEvent, void>>,
): Promise<object> {
  const { plan } = running;
  const texts = plan.jobs.map(() => ({
    parts: [] as string[],
    pieces: [] as WholeChoice['pieces'][number][],
  }));
  const choices: WholeChoice[] = [];
  for (let result = await first; !result.done; result = await running.events.next()) {
    const event = result.value;
    const { parts, pieces } = texts[event.index]!;
    switch (event.type) {
      case 'text':
        parts.push(event.text);
        pieces.push(...event.pieces);
        break;
      case 'finished':
        choices.push({ index: event.index, text: parts.join(''), pieces, reason: event.reason });
        break;
    }
  }
  choices.sort((a, b) => a.index - b.index);
  return {
    ...envelope(model, plan, plan.wire.object),
    choices: choices.map((choice) => plan.wire.whole(choice, plan.withLogprobs)),
    usage: usageOf(running),
    maskroute: infoOf(running),
  };
}

/**
 * The answer as SSE frames, `first` being the already requested first event. Never rejects: a late failure is
 * an `error` event after what was sent, without `[DONE]`. `onEnd` is called once, with the failure if any.
 */
export async function* answerFrames(
  model: ServedModel,
  running: RunningAnswer,
  first: Promise<IteratorResult<ChoiceEvent, void>>,
  onEnd: (error: MaskrouteError | undefined) => void,
): AsyncGenerator<string, void> {
  const { plan, events } = running;
  const head = envelope(model, plan, plan.wire.chunkObject);
  const usage = plan.includeUsage ? { usage: null } : {};
  const chunk = (choice: object, extra: object = {}) =>
    sseData({ ...head, choices: [choice], ...usage, ...extra });
  const usageChunk = () =>
    sseData({ ...head, choices: [], usage: usageOf(running), maskroute: infoOf(running) });
  const opened = new Set<number>();
  let unfinished = plan.jobs.length;
  // What it is when the reader leaves in between.
  let outcome: MaskrouteError | undefined = new MaskrouteError('cancelled', 'The client left.');
  try {
    for (let result = await first; !result.done; result = await events.next()) {
      const event = result.value;
      const open = opened.has(event.index) ? undefined : plan.wire.open(event.index);
      opened.add(event.index);
      if (open !== undefined) yield chunk(open);
      switch (event.type) {
        case 'text':
          yield chunk(plan.wire.text(event.index, event.text, plan.withLogprobs ? event.pieces : undefined));
          break;
        case 'finished': {
          const last = --unfinished === 0 && !plan.includeUsage;
          yield chunk(
            plan.wire.finish(event.index, event.reason),
            last ? { maskroute: infoOf(running) } : {},
          );
          break;
        }
      }
    }
    if (plan.includeUsage) yield usageChunk();
    outcome = undefined;
    yield SSE_DONE;
  } catch (thrown) {
    outcome = toMaskrouteError(thrown);
    // The tokens were spent, so a client that counts them hears of them.
    if (plan.includeUsage) yield usageChunk();
    yield sseError({ ...outcome.toWire(), maskroute: infoOf(running) });
  } finally {
    onEnd(outcome);
    void events.return().catch(() => {});
  }
}

/** The completion's id follows from the edge's name for it, so that the edge knows it without reading the answer. */
const envelope = (model: ServedModel, plan: AnswerPlan, object: string): object => ({
  id: plan.wire.idPrefix + (plan.completion ?? plan.requestId),
  object,
  created: Math.floor(Date.now() / 1000),
  model: plan.modelName,
  system_fingerprint: `fp_${model.engine.model.hash.slice(0, 12)}_${plan.mask.id}`,
});
