/**
 * Ordinary text for distillation, cut from calibration data: every prompt as the edge would embed it, and the
 * sentences of everything that was said, so that words are met in many contexts.
 */
import type { CalibrationRow } from './read-data.ts';

/** A sentence shorter than this is joined to the next one. */
const SENTENCE_CHARS_MIN = 24;
const SENTENCE_CHARS_MAX = 400;

/**
 * Distinct snippets in the order of the rows: first all prompts, then sentences.
 * @param sentencesPerRowMax bounds what one long document contributes.
 */
export function snippets(rows: readonly CalibrationRow[], sentencesPerRowMax: number): string[] {
  const found = new Set<string>();
  for (const row of rows) found.add(row.routeText);
  for (const row of rows) {
    const texts =
      row.content.type === 'chat' ? row.content.turns.map((turn) => turn.content) : [row.content.text];
    for (const sentence of texts.flatMap(sentences).slice(0, sentencesPerRowMax)) found.add(sentence);
  }
  found.delete('');
  return [...found];
}

/** Sentences and lines of a text, the short ones joined; what has no sentence ends is cut by length. */
export function sentences(text: string): string[] {
  const pieces = text.split(/(?<=[.!?。！？।])\s+|\n+/u).flatMap((piece) => chunks(piece.trim()));
  const result: string[] = [];
  let pending = '';
  for (const piece of pieces) {
    pending = pending === '' ? piece : `${pending} ${piece}`;
    if (pending.length < SENTENCE_CHARS_MIN) continue;
    result.push(pending);
    pending = '';
  }
  if (pending !== '') result.push(pending);
  return result;
}

function chunks(piece: string): string[] {
  const result: string[] = [];
  for (let at = 0; at < piece.length; at += SENTENCE_CHARS_MAX)
    result.push(piece.slice(at, at + SENTENCE_CHARS_MAX));
  return result;
}
