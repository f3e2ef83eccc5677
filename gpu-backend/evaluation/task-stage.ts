/** The multiple-choice part of an evaluation: the same contestants, each question routed as the edge would route it. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { Contestant } from './contestants.ts';
import type { Context } from './context.ts';
import { routeSets } from './context.ts';
import type { LineUp } from './line-up.ts';
import { equalCountContestants } from './line-up.ts';
import type { EvaluationRow } from './result.ts';
import type { LoadedTask, Verdicts } from './tasks/run-tasks.ts';
import { answerTask, taskFigures } from './tasks/run-tasks.ts';
import { encodeChoices } from './tasks/score-question.ts';

type TaskPart = Pick<EvaluationRow, 'tasks'>;

/** @throws MaskrouteError `invalid_data` naming a question that the model cannot be asked. */
export function checkTasks({ runner, text }: Context, loaded: readonly LoadedTask[]): void {
  for (const { task, questions } of loaded) {
    for (const [index, question] of questions.entries()) {
      try {
        encodeChoices(question, text.tokenizer, runner.config.contextTokens);
      } catch (cause) {
        const reason = `${task}, question ${index + 1}: ${(cause as Error).message}.`;
        throw new MaskrouteError('invalid_data', reason, { cause });
      }
    }
  }
}

/** Figures of each contestant, in the order of {@link equalCountContestants}; empty objects without tasks. */
export async function runTasks(
  context: Context,
  lineUp: LineUp,
  loaded: readonly LoadedTask[],
): Promise<TaskPart[]> {
  const { options } = context;
  const found: Record<string, NonNullable<EvaluationRow['tasks']>[string]>[] = [];
  const questions = loaded.reduce((sum, task) => sum + task.questions.length, 0);
  let done = 0;
  for (const task of loaded) {
    const sets = await routeSets(
      options,
      task.questions.map(({ routeText }) => routeText),
    );
    const { contestants } = equalCountContestants({ ...lineUp, rowCount: task.questions.length, sets });
    const total = questions * masksPerQuestion(contestants);
    let dense: Verdicts | undefined;
    for (const [index, contestant] of contestants.entries()) {
      const verdicts = await answerTask(
        { ...options, ...context, onQuestion: () => options.onProgress('tasks', ++done, total) },
        task,
        contestant,
      );
      dense ??= verdicts;
      found[index] = { ...found[index], [task.task]: taskFigures(task, verdicts, dense) };
    }
  }
  const { length } = equalCountContestants(lineUp).contestants;
  return Array.from({ length }, (_, i) => (found[i] === undefined ? {} : { tasks: found[i] }));
}

const masksPerQuestion = (contestants: readonly Contestant[]): number =>
  contestants.reduce((sum, { masks }) => sum + masks[0]!.length, 0);
