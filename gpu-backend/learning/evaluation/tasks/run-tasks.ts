/**
 * The multiple-choice part of an evaluation: the accuracy of every contestant. Questions are routed as the edge would
 * route them; answers are kept by content.
 */
import { z } from 'zod';
import { maskId } from '../../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../../shared/wire/errors.ts';
import { average } from '../../../measure.ts';
import { bootstrapInterval, weightedRatio } from '../../search/bootstrap.ts';
import type { Contestant } from '../contestants.ts';
import { type Context, contestantsOn } from '../evaluation-context.ts';
import type { LineUp } from '../line-up.ts';
import type { EvaluationRow, TaskFigures } from '../result.ts';
import { openKeptAnswers } from '../score-rows.ts';
import { hasNorm, type Question, type Task } from './read-task.ts';
import { encodeChoices, judge, scoreChoices } from './score-question.ts';

export type LoadedTask = { readonly task: Task; readonly questions: readonly Question[] };

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

/** Figures of each contestant, in the order of {@link contestantsOn}; empty without tasks. */
export async function runTasks(
  context: Context,
  lineUp: LineUp,
  loaded: readonly LoadedTask[],
): Promise<Pick<EvaluationRow, 'tasks'>[]> {
  const { options } = context;
  const found: Record<string, TaskFigures>[] = [];
  const questions = loaded.reduce((sum, task) => sum + task.questions.length, 0);
  let done = 0;
  for (const task of loaded) {
    const { contestants } = await contestantsOn(context, lineUp, task.questions);
    const total = questions * masksPerQuestion(contestants);
    let dense: Verdicts | undefined;
    for (const [index, contestant] of contestants.entries()) {
      const onQuestion = () => options.onProgress('tasks', ++done, total);
      const verdicts = await answerTask(context, task, contestant, onQuestion);
      dense ??= verdicts;
      found[index] = { ...found[index], [task.task]: taskFigures(task, verdicts, dense) };
    }
  }
  return found.map((tasks) => ({ tasks }));
}

const masksPerQuestion = (contestants: readonly Contestant[]): number =>
  contestants.reduce((sum, { masks }) => sum + masks[0]!.length, 0);

/** For each question 1 (right) or 0 (wrong), or the mean over several masks. */
type Verdicts = { readonly acc: number[]; readonly accNorm: number[] };

/**
 * Answers under several masks are averaged. Rejects when the evaluation's signal aborts; the next run reuses finished
 * answers.
 * @param masks the masks of each question.
 */
async function answerTask(
  { options, runner, session, text }: Context,
  { task, questions }: LoadedTask,
  { masks }: Pick<Contestant, 'masks'>,
  onQuestion: () => void,
): Promise<Verdicts> {
  const { evaluated, signal } = options;
  const journal = await openKeptAnswers(evaluated, { kind: 'task', task, questions }, z.array(z.number()));
  const cache = runner.newCache();
  const verdicts: Verdicts = { acc: [], accNorm: [] };
  for (const [index, asked] of questions.entries()) {
    const judged = [];
    for (const mask of masks[index]!) {
      const name = `${index} ${maskId(evaluated.model.manifest.hash, mask)}`;
      const found = await journal.result(name, () => {
        signal?.throwIfAborted();
        const choices = encodeChoices(asked, text.tokenizer, runner.config.contextTokens);
        return scoreChoices({ runner, session, cache }, choices, mask);
      });
      judged.push(judge(asked, found));
      onQuestion();
    }
    verdicts.acc.push(average(judged.map(({ acc }) => acc)));
    verdicts.accNorm.push(average(judged.map(({ accNorm }) => accNorm)));
  }
  return verdicts;
}

/** `dense`: the dense model's verdicts on the same questions, the reference of `keptAboveChance`. */
function taskFigures({ task, questions }: LoadedTask, verdicts: Verdicts, dense: Verdicts): TaskFigures {
  const chance = average(questions.map(({ choices }) => 1 / choices.length));
  const norm = hasNorm(task);
  const main = (of: Verdicts) => average(norm ? of.accNorm : of.acc) - chance;
  const ones = questions.map(() => 1);
  const intervalOf = (values: readonly number[]) =>
    bootstrapInterval(values.length, (weights) => weightedRatio(weights, values, ones));
  return {
    questions: questions.length,
    acc: average(verdicts.acc),
    accNorm: norm ? average(verdicts.accNorm) : null,
    accInterval: intervalOf(verdicts.acc),
    accNormInterval: norm ? intervalOf(verdicts.accNorm) : null,
    chance,
    keptAboveChance: main(dense) > 0 ? main(verdicts) / main(dense) : null,
  };
}
