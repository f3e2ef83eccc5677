/** One completion from its arrival to its end: cancelling it, and accounting for it exactly once. */

import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { AnswerUsage } from '../../shared/wire/protocol.ts';
import { runAnswer, usageOf } from './answer.ts';
import { deadlineExceeded } from './completions.ts';
import type { ApiContext, ApiEnv, ApiParts } from './parts.ts';
import type { AnswerPlan, RunningAnswer } from './plan.ts';

export type AnswerRecord = {
  /** Aborts when the caller leaves or its time is over. */
  readonly signal: AbortSignal;
  /**
   * Its prompts are read from now on. What that costs is kept in the result: of a request that is refused for its
   * prompts, or that leaves meanwhile, it is the whole cost.
   */
  plans(completion: string): { tokens: number };
  run(plan: AnswerPlan): RunningAnswer;
  /** The work is called off when the caller's time is over; undefined: it waits. */
  expectWithin(limit_ms: number | undefined): void;
  /** `isSent`: it goes to the caller at once, so that the caller's wait is over. */
  firstEvent(isSent: boolean): void;
  elapsed_ms(): number;
  abort(): void;
  /** The error is still to be answered, with its own status. */
  end(error: MaskrouteError | undefined): void;
  /** The status was already sent. */
  endLate(error: MaskrouteError | undefined): void;
};

/** `arrived_ms`: when its first bytes came, on the clock of `performance`. */
export function openRecord(
  parts: ApiParts,
  c: ApiContext,
  endpoint: string,
  arrived_ms: number,
): AnswerRecord {
  const controller = new AbortController();
  const leave = parts.lifecycle.begin(controller);
  const clientLeft = c.req.raw.signal;
  if (clientLeft.aborted) controller.abort();
  clientLeft.addEventListener('abort', () => controller.abort(), { once: true });
  const elapsed_ms = () => performance.now() - arrived_ms;
  const spent = { tokens: 0 };
  let planned: string | undefined;
  let running: RunningAnswer | undefined;
  let first_ms: number | undefined;
  let ended = false;
  let deadline: NodeJS.Timeout | undefined;

  function close(error: MaskrouteError | undefined, answered: boolean): void {
    if (ended) return;
    ended = true;
    clearTimeout(deadline);
    leave();
    if (answered) parts.metrics.request(endpoint, 200, error?.code ?? 'ok');
    if (running !== undefined) account(parts, c, endpoint, running, error, first_ms, elapsed_ms());
    else if (planned !== undefined) {
      parts.recent.ended(planned, { prompt_tokens: spent.tokens, completion_tokens: 0 });
    }
  }

  return {
    signal: controller.signal,
    plans(completion) {
      planned = completion;
      parts.recent.began(completion);
      return spent;
    },
    run(plan) {
      running = runAnswer(parts.model, plan, parts.limits, controller.signal);
      return running;
    },
    expectWithin(limit_ms) {
      if (limit_ms === undefined) return;
      const left_ms = Math.max(0, limit_ms - elapsed_ms());
      deadline = setTimeout(() => controller.abort(deadlineExceeded(limit_ms)), left_ms);
    },
    firstEvent(isSent) {
      first_ms = elapsed_ms();
      if (isSent) clearTimeout(deadline);
    },
    elapsed_ms,
    abort: () => controller.abort(),
    end: (error) => close(error, error === undefined),
    endLate: (error) => close(error, true),
  };
}

function account(
  parts: ApiParts,
  c: ApiContext,
  endpoint: string,
  running: RunningAnswer,
  error: MaskrouteError | undefined,
  first_ms: number | undefined,
  total_ms: number,
): void {
  const { plan } = running;
  const usage = usageOf(running);
  const figures = {
    endpoint,
    mask: plan.mask.id,
    promptTokens: usage.prompt_tokens,
    completionTokens: usage.completion_tokens,
    cachedTokens: usage.prompt_tokens_details.cached_tokens,
    first_ms,
    total_ms,
    timings: running.progress.flatMap(({ timings }) => timings ?? []),
  };
  parts.metrics.answer(figures);
  const { prompt_tokens, completion_tokens } = usage;
  parts.recent.ended(plan.completion ?? plan.requestId, { prompt_tokens, completion_tokens });
  parts.log.info(
    {
      request_id: plan.requestId,
      tenant: c.get('caller').tenant,
      endpoint,
      stream: plan.stream,
      choices: plan.jobs.length,
      mask: plan.mask.id,
      sparsity: plan.mask.sparsity,
      prompt_tokens: figures.promptTokens,
      completion_tokens: figures.completionTokens,
      cached_tokens: figures.cachedTokens,
      first_ms: first_ms === undefined ? undefined : Math.round(first_ms),
      total_ms: Math.round(total_ms),
      outcome: error?.code ?? 'ok',
    },
    'answer',
  );
}

/*
 * What recent answers cost, for callers that did not hear the end of theirs: an edge whose client hung up still
 * has to account for the tokens. Memory only, and bounded: an answer that is asked for late is not there.
 */

const ANSWERS_MAX = 5_000;

export type RecentAnswers = {
  began(id: string): void;
  ended(id: string, usage: AnswerUsage): void;
  /** Null while it still runs; undefined when it was never here, or is forgotten. */
  find(id: string): AnswerUsage | null | undefined;
};

export function createRecentAnswers(): RecentAnswers {
  const answers = new Map<string, AnswerUsage | null>();
  const put = (id: string, value: AnswerUsage | null) => {
    answers.delete(id);
    if (answers.size >= ANSWERS_MAX) answers.delete(answers.keys().next().value!);
    answers.set(id, value);
  };
  return { began: (id) => put(id, null), ended: put, find: (id) => answers.get(id) };
}

/* `GET /v1/answers/{id}`: what a recent answer cost, asked by an edge that did not hear the end of it. */

export const answerRoutes = ({ recent }: Pick<ApiParts, 'recent'>): Hono<ApiEnv> =>
  new Hono<ApiEnv>().get('/v1/answers/:id', (c) => {
    const usage = recent.find(c.req.param('id'));
    if (usage === undefined) throw new MaskrouteError('not_found', 'There is no such answer.');
    const counts = usage ?? { prompt_tokens: 0, completion_tokens: 0 };
    return c.json({ object: 'maskroute.answer', finished: usage !== null, ...counts });
  });
