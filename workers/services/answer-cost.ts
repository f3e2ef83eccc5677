/**
 * What an answer cost whose end the edge did not hear: asked of the backends, a few times, since the one that
 * worked on it notices a hang-up only a little later.
 */
import { type AnswerUsage, answerPath, answerUsageSchema } from '../../shared/protocol.ts';
import { COST_QUESTION_DELAYS_ms, COST_QUESTION_ms } from '../limits.ts';
import type { Said } from './backends/index.ts';

/** Every backend's answer to one question, or that of `backend` alone. */
export type AskBackends = (path: string, timeout_ms: number, backend?: string) => Promise<readonly Said[]>;

/**
 * Who may have worked on it: the one whose answer began; all of them, of which one refused it, and they are done with
 * it; or any of them, where one may only be about to begin.
 */
export type RanAt = 'answerer' | 'refuser' | 'anywhere';

export type CostQuestion = {
  readonly completion: string;
  readonly ranAt: RanAt | 'nowhere';
  /** The one whose answer began. */
  readonly answerer: string | undefined;
};

/** `never_began`: no backend knows of it. `unknown`: the one that could say is gone, or has forgotten it. */
export type AnswerCost = AnswerUsage | 'never_began' | 'unknown';

/**
 * A client that asked once is charged once, however many backends worked on it: for what the answerer spent on its
 * answer; where none began one, it is what the one spent that spent the most.
 */
export async function answerCost(
  ask: AskBackends,
  { completion, ranAt, answerer }: CostQuestion,
): Promise<AnswerCost> {
  const only = ranAt === 'answerer' ? answerer : undefined;
  let cost: AnswerCost = 'unknown';
  for (const delay_ms of COST_QUESTION_DELAYS_ms) {
    await new Promise((resolve) => setTimeout(resolve, delay_ms));
    const said = await ask(answerPath(completion), COST_QUESTION_ms, only).catch(() => []);
    const parts = said.flatMap((one) => answerUsageSchema.safeParse(one.value).data ?? []);
    if (parts.length > 0 && parts.every(({ finished }) => finished)) {
      return parts.reduce((most, part) => (tokensOf(part) > tokensOf(most) ? part : most));
    }
    const isUnheardOf = said.length > 0 && said.every(({ status }) => status === 404);
    if (isUnheardOf && ranAt === 'answerer') return 'unknown';
    cost = isUnheardOf ? 'never_began' : 'unknown';
    if (isUnheardOf && ranAt === 'refuser') return cost;
  }
  return cost;
}

const tokensOf = ({ prompt_tokens, completion_tokens }: AnswerUsage): number =>
  prompt_tokens + completion_tokens;
