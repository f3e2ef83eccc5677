/** Accuracy of every contestant on the task files, each answer kept by content. */
import { z } from 'zod';
import type { Mask, ModelHash } from '../../../shared/mask.ts';
import { maskId } from '../../../shared/mask.ts';
import type { Runner } from '../../engine/runner.ts';
import type { ModelText } from '../../model/model-text.ts';
import type { InstalledModel } from '../../model/store.ts';
import { bootstrapInterval, weightedRatio } from '../bootstrap.ts';
import { average } from '../contestants.ts';
import type { Journal } from '../journal.ts';
import { openJournal } from '../journal.ts';
import type { TaskFigures } from '../result.ts';
import type { ScoreSession } from '../score-graph.ts';
import { modelKey } from '../search.ts';
import type { Question, Task } from './question.ts';
import { hasNorm } from './question.ts';
import { encodeChoices, judge, scoreChoices } from './score-question.ts';

export type LoadedTask = { readonly task: Task; readonly questions: readonly Question[] };

export type TaskContext = {
  readonly home: string;
  readonly model: InstalledModel;
  readonly runner: Runner;
  readonly session: ScoreSession;
  readonly text: ModelText;
  readonly onQuestion: () => void;
  readonly signal?: AbortSignal | undefined;
};

/** The masks of each question; the answers of several are averaged. */
export type TaskEntry = { readonly masks: readonly (readonly Mask[])[] };

/** Right or wrong for each question: 0 to 1, a mean where there are several masks. */
export type Verdicts = { readonly acc: number[]; readonly accNorm: number[] };

/** Rejects when `signal` aborts; what was answered is read back the next time. */
export async function answerTask(
  context: TaskContext,
  { task, questions }: LoadedTask,
  { masks }: TaskEntry,
): Promise<Verdicts> {
  const { model, runner, session, text, signal } = context;
  const question = { kind: 'task', model: modelKey(model), task, questions };
  const journal: Journal<number[]> = await openJournal(context.home, question, z.array(z.number()));
  const cache = runner.newCache();
  const verdicts: Verdicts = { acc: [], accNorm: [] };
  for (const [index, asked] of questions.entries()) {
    const judged = [];
    for (const mask of masks[index]!) {
      const name = `${index} ${maskId(model.manifest.hash as ModelHash, mask)}`;
      let found = journal.get(name);
      if (found === undefined) {
        signal?.throwIfAborted();
        const choices = encodeChoices(asked, text.tokenizer, runner.config.contextTokens);
        found = await scoreChoices({ runner, session, cache }, choices, mask);
        await journal.set(name, found);
      }
      judged.push(judge(asked, found));
      context.onQuestion();
    }
    verdicts.acc.push(average(judged.map(({ acc }) => acc)));
    verdicts.accNorm.push(average(judged.map(({ accNorm }) => accNorm)));
  }
  return verdicts;
}

/** `dense`: the dense model's verdicts on the same questions, which kept shares refer to. */
export function taskFigures(
  { task, questions }: LoadedTask,
  verdicts: Verdicts,
  dense: Verdicts,
): TaskFigures {
  const chance = average(questions.map(({ choices }) => 1 / choices.length));
  const main = (of: Verdicts) => average(hasNorm(task) ? of.accNorm : of.acc) - chance;
  const ones = questions.map(() => 1);
  const intervalOf = (values: readonly number[]) => {
    const found = bootstrapInterval(values.length, (weights) => weightedRatio(weights, values, ones));
    return found === undefined ? null : ([...found] as [number, number]);
  };
  const norm = hasNorm(task);
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
