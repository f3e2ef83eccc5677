/**
 * What an answer cost whose end the edge did not hear: asked of the backends, a few times, since the one that
 * worked on it notices a hang-up only a little later.
 */
import { type AnswerUsage, answerPath, answerUsageSchema } from '../../shared/protocol.ts';
import { COST_QUESTION_DELAYS_ms, COST_QUESTION_ms } from '../limits.ts';

/** Every backend's answer to one question, or that of `backend` alone; rejects when none answers. */
export type AskBackends = (path: string, timeout_ms: number, backend?: string) => Promise<unknown[]>;

/**
 * Null when no backend can say. A client that asked once is charged once, however many backends worked on it: for what
 * `backend` spent on its answer; undefined: none began one, and it is what the one spent that spent the most.
 */
export async function answerCost(
  ask: AskBackends,
  completion: string,
  backend: string | undefined,
): Promise<AnswerUsage | null> {
  for (const delay_ms of COST_QUESTION_DELAYS_ms) {
    await new Promise((resolve) => setTimeout(resolve, delay_ms));
    const said = await ask(answerPath(completion), COST_QUESTION_ms, backend).catch(() => []);
    const parts = said.flatMap((one) => answerUsageSchema.safeParse(one).data ?? []);
    if (parts.length === 0) return null;
    if (parts.some(({ finished }) => !finished)) continue;
    return parts.reduce((most, part) => (tokensOf(part) > tokensOf(most) ? part : most));
  }
  return null;
}

const tokensOf = ({ prompt_tokens, completion_tokens }: AnswerUsage): number =>
  prompt_tokens + completion_tokens;
