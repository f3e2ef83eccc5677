/**
 * One HTTP answer from many choices: whole, or as a stream of chunks. Which format it has is `Wire`'s
 * matter; how it reaches the client is the route's.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError, toMaskrouteError } from '../../shared/errors.ts';
import { infoOf, usageOf } from './answer-figures.ts';
import type { AnswerPlan, RunningAnswer } from './answer-plan.ts';
import type { ChoiceEvent, Progress } from './choice.ts';
import { cancellation, runChoice } from './choice.ts';
import type { ApiLimits } from './limits.ts';
import { mergeStreams } from './merge-streams.ts';
import type { ServedModel } from './served-model.ts';
import { SSE_DONE, sseData, sseError } from './sse.ts';
import type { WholeChoice } from './wire.ts';

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
