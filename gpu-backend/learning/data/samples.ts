/**
 * Calibration rows as the token sequences that the model would see, rendered through its chat template; and which rows
 * are held out. The split is by content: equal prompts are always on the same side, and reordering rows changes
 * nothing.
 */
import { createHash } from 'node:crypto';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { permutation, type Random } from '../../random.ts';
import type { CalibrationRow, Turn } from './read-data.ts';

export type Sample = {
  readonly tokenIds: Int32Array;
  /** The first scored position; the tokens before it are the same in every conversation. */
  readonly scoreFrom: number;
};

type SampleOptions = {
  /** Scored positions wanted in all; fewer when the rows end before. */
  readonly positions: number;
  /** Tokens of one sequence, cut at the end: many short texts tell more than one long one. */
  readonly tokensMax: number;
  readonly scored?: Scored;
};

/** Which positions of a row are scored: only its answer, or all but the beginning that every conversation shares. */
export type Scored = 'answers' | 'all';

/** Every position but the last predicts a token. */
export const scoredPositions = (sample: Sample): number => sample.tokenIds.length - 1 - sample.scoreFrom;

/** A row, and what the model sees of it. */
export type SampledRow = { readonly row: CalibrationRow; readonly sample: Sample };

/** Rows in a random order until there are enough positions. @throws MaskrouteError `invalid_data` as {@link encodeRow}. */
export function drawRows(
  rows: readonly CalibrationRow[],
  text: ModelText,
  eosTokenId: number,
  random: Random,
  { positions, tokensMax, scored }: SampleOptions,
): SampledRow[] {
  const sampleOf = createSampler(text, eosTokenId, tokensMax, scored);
  const drawn: SampledRow[] = [];
  let total = 0;
  for (const index of permutation(rows.length, random)) {
    if (total >= positions) break;
    const row = rows[index]!;
    const sample = sampleOf(row);
    if (sample === undefined) continue;
    drawn.push({ row, sample });
    total += scoredPositions(sample);
  }
  return drawn;
}

/** What {@link drawRows} draws, without the rows. */
export const drawSamples = (...args: Parameters<typeof drawRows>): Sample[] =>
  drawRows(...args).map(({ sample }) => sample);

/** Returns a function that makes one row's sample, or `undefined` when the row is too short to score. */
export function createSampler(
  text: ModelText,
  eosTokenId: number,
  tokensMax: number,
  scored: Scored = 'all',
): (row: CalibrationRow) => Sample | undefined {
  const prefix = templatePrefix(text);
  return (row) => {
    const tokenIds = encodeRow(row, text, eosTokenId).slice(0, tokensMax);
    const from = scored === 'answers' ? answerStart(row, text) : undefined;
    const scoreFrom = from ?? (row.content.type === 'chat' ? commonLength(tokenIds, prefix) : 0);
    const sample = { tokenIds, scoreFrom };
    return scoredPositions(sample) < 1 ? undefined : sample;
  };
}

/**
 * Token ids of a row. If the assistant has the last turn, it is encoded as the model's answer, with its end token. Calls of tools are
 * written by the template, which asks for another answer after them.
 * @throws MaskrouteError `invalid_data`, with the row's kind, roles and prompt, when the model's chat template refuses
 * it.
 */
export function encodeRow(row: CalibrationRow, text: ModelText, eosTokenId: number): Int32Array {
  const { content } = row;
  if (content.type === 'text') return text.encodePrompt(content.text);
  const { turns } = content;
  const last = turns.at(-1)!;
  const hasAnswer = last.role === 'assistant' && last.tool_calls === undefined;
  try {
    const prompt = text.encodeChat(hasAnswer ? turns.slice(0, -1) : turns);
    if (!hasAnswer) return prompt;
    const answer = text.tokenizer.encode(last.content, { addSpecial: false });
    return Int32Array.from([...prompt, ...answer, eosTokenId]);
  } catch (cause) {
    if (!(cause instanceof MaskrouteError)) throw cause;
    const prompt = JSON.stringify(row.routeText.slice(0, QUOTED_CHARS));
    const where = `The row of kind ${row.kind} that begins with ${prompt} (${rolesOf(turns)})`;
    throw new MaskrouteError('invalid_data', `${where}: ${cause.message}`, { cause });
  }
}

/** Characters of a prompt that an error message quotes. */
const QUOTED_CHARS = 60;

const rolesOf = (turns: readonly Turn[]): string =>
  turns.map(({ role, tool_calls }) => (tool_calls === undefined ? role : `${role} with calls`)).join(', ');

/**
 * Some templates refuse certain sequences of roles, such as a system prompt or two user turns in a row. So one row of
 * every sequence of roles is tried before the work, which might reach the first such row only after hours. @throws
 * MaskrouteError `invalid_data` as {@link encodeRow}.
 */
export function tryTemplate(rows: Iterable<CalibrationRow>, text: ModelText): void {
  const tried = new Set<string>();
  for (const row of rows) {
    if (row.content.type === 'text' || tried.has(rolesOf(row.content.turns))) continue;
    tried.add(rolesOf(row.content.turns));
    encodeRow(row, text, 0);
  }
}

/** The position that predicts the first token of a row's answer; `undefined` for a row without an answer. */
function answerStart({ content }: CalibrationRow, text: ModelText): number | undefined {
  if (content.type === 'text' || content.turns.at(-1)!.role !== 'assistant') return undefined;
  return text.encodeChat(content.turns.slice(0, -1)).length - 1;
}

/** What the template writes before any user's first word (often a default system prompt). */
function templatePrefix(text: ModelText): Int32Array {
  const [a, b] = ['A', 'zebra'].map((content) => text.encodeChat([{ role: 'user', content }]));
  return a!.slice(0, commonLength(a!, b!));
}

/** Number of leading tokens that both sequences share. */
export function commonLength(a: Int32Array, b: Int32Array): number {
  let length = 0;
  while (length < Math.min(a.length, b.length) && a[length] === b[length]) length++;
  return length;
}

/**
 * Share of the prompts from which neither masks nor surrogates are learned. All commands use the same share; otherwise
 * one would learn from what another holds out.
 */
export const HELD_OUT_SHARE = 0.1;

type Split = { readonly fit: CalibrationRow[]; readonly heldOut: CalibrationRow[] };

/** About `share` of the prompts go to `heldOut`; another `purpose` divides them independently. */
export function splitRows(rows: readonly CalibrationRow[], share: number, purpose = 'held-out'): Split {
  const fit: CalibrationRow[] = [];
  const heldOut: CalibrationRow[] = [];
  for (const row of rows) (isHeldOut(row, share, purpose) ? heldOut : fit).push(row);
  return { fit, heldOut };
}

/** Whether a row is held out. A larger `share` also holds out everything that a smaller share does. */
export function isHeldOut({ routeText }: CalibrationRow, share: number, purpose = 'held-out'): boolean {
  const digest = createHash('sha256').update(`${purpose}\n${routeText}`).digest();
  return digest.readUInt32LE() / 2 ** 32 < share;
}

/** Each distinct row once: repeated rows must not count twice. */
export function distinctRows(rows: readonly CalibrationRow[]): CalibrationRow[] {
  const seen = new Set<string>();
  return rows.filter(({ content }) => {
    const digest = createHash('sha256').update(JSON.stringify(content)).digest('base64');
    if (seen.has(digest)) return false;
    seen.add(digest);
    return true;
  });
}
