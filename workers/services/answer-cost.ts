/**
 * What an answer cost whose end the edge did not hear: asked of the backends, a few times, since the one that
 * worked on it notices a hang-up only a little later.
 */
import { type AnswerUsage, answerPath, answerUsageSchema } from '../../shared/protocol.ts';
import { COST_QUESTION_DELAYS_ms, COST_QUESTION_ms } from '../limits.ts';

/** Every backend's answer to one question; rejects when none answers. */
export type AskBackends = (path: string, timeout_ms: number) => Promise<unknown[]>;

/** Null when no backend can say. An answer that several worked on (a hedge) cost what all of them spent. */
export async function answerCost(ask: AskBackends, completion: string): Promise<AnswerUsage | null> {
  for (const delay_ms of COST_QUESTION_DELAYS_ms) {
    await new Promise((resolve) => setTimeout(resolve, delay_ms));
    const said = await ask(answerPath(completion), COST_QUESTION_ms).catch(() => []);
    const parts = said.flatMap((one) => answerUsageSchema.safeParse(one).data ?? []);
    if (parts.length === 0) return null;
    if (parts.some(({ finished }) => !finished)) continue;
    return {
      prompt_tokens: parts.reduce((sum, part) => sum + part.prompt_tokens, 0),
      completion_tokens: parts.reduce((sum, part) => sum + part.completion_tokens, 0),
    };
  }
  return null;
}
