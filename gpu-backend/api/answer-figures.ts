/** What an answer cost: tokens as OpenAI counts them, and times. Current while it runs, too. */
import type { Usage } from '../../shared/openai.ts';
import type { MaskrouteInfo } from '../../shared/protocol.ts';
import type { RunningAnswer } from './answer-plan.ts';

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
