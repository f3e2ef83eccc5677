/**
 * What recent answers cost, for callers that did not hear the end of theirs: an edge whose client hung up still
 * has to account for the tokens. Memory only, and bounded: an answer that is asked for late is not there.
 */
import type { AnswerUsage } from '../../shared/protocol.ts';

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
