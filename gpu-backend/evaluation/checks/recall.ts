/** Answers that are facts, as samples whose answer alone counts: from rows of question and answer, and from tasks. */
import type { CalibrationRow } from '../../calibration/read-data.ts';
import type { Sample } from '../../calibration/samples.ts';
import { createSampler } from '../../calibration/samples.ts';
import type { ModelText } from '../../model/model-text.ts';
import type { Question } from '../tasks/question.ts';
import { encodeChoices } from '../tasks/score-question.ts';

export type Fact = { readonly kind: string; readonly routeText: string; readonly sample: Sample };

/** Rows without an answer count whole. Those that are too long or short to score are left out. */
export function factsOfRows(
  rows: readonly CalibrationRow[],
  text: ModelText,
  eosTokenId: number,
  tokensMax: number,
): Fact[] {
  const sampleOf = createSampler(text, eosTokenId, tokensMax, 'answers');
  return rows.flatMap(({ kind, routeText, ...row }) => {
    const sample = sampleOf({ kind, routeText, ...row });
    return sample === undefined ? [] : [{ kind, routeText, sample }];
  });
}

/** The right choice of each question. */
export function factsOfQuestions(
  kind: string,
  questions: readonly Question[],
  text: ModelText,
  contextMax: number,
): Fact[] {
  return questions.flatMap((question) => {
    const { tokenIds, contextTokens } = encodeChoices(question, text.tokenizer, contextMax)[question.gold]!;
    if (tokenIds.length <= contextTokens || contextTokens === 0) return [];
    return [{ kind, routeText: question.routeText, sample: { tokenIds, scoreFrom: contextTokens - 1 } }];
  });
}
