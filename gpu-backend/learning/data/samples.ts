/**
 * Calibration rows as the token sequences that the model would see, rendered through its chat template; and which rows
 * are held out. That goes by content: equal prompts never stand on both sides, and the split survives any reordering.
 */
import { createHash } from 'node:crypto';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { permutation, type Random } from '../../random.ts';
import type { CalibrationRow } from './read-data.ts';

export type Sample = {
  readonly tokenIds: Int32Array;
  /** The first position whose next token counts; what is before is the same in every conversation. */
  readonly scoreFrom: number;
};

type SampleOptions = {
  /** Scored positions wanted in all; fewer when the rows end before. */
  readonly positions: number;
  /** Tokens of one sequence, cut at the end: many short texts tell more than one long one. */
  readonly tokensMax: number;
  readonly scored?: Scored;
};

/** What counts of a row: its answer alone, or all but the beginning that every conversation shares. */
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

/** One row's sample; `undefined` when it is too short to score. */
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
 * A last turn of the assistant is an answer to what came before, ended as the model ends its own.
 * @throws MaskrouteError `invalid_data`, with the row's kind, roles and prompt, when the model's chat template refuses it.
 */
export function encodeRow(row: CalibrationRow, text: ModelText, eosTokenId: number): Int32Array {
  const { content } = row;
  if (content.type === 'text') return text.encodePrompt(content.text);
  const last = content.turns.at(-1)!;
  const hasAnswer = last.role === 'assistant';
  try {
    const prompt = text.encodeChat(hasAnswer ? content.turns.slice(0, -1) : [...content.turns]);
    if (!hasAnswer) return prompt;
    const answer = text.tokenizer.encode(last.content, { addSpecial: false });
    return Int32Array.from([...prompt, ...answer, eosTokenId]);
  } catch (cause) {
    if (!(cause instanceof MaskrouteError)) throw cause;
    const prompt = JSON.stringify(row.routeText.slice(0, QUOTED_CHARS));
    const where = `The row of kind ${row.kind} that begins with ${prompt} (${rolesOf(content.turns)})`;
    throw new MaskrouteError('invalid_data', `${where}: ${cause.message}`, { cause });
  }
}

/** Of a prompt, in a message. */
const QUOTED_CHARS = 60;

const rolesOf = (turns: readonly { readonly role: string }[]): string =>
  turns.map(({ role }) => role).join(', ');

/**
 * Templates refuse rows for their roles: a system prompt, or two users in a row. So one row of every order of roles is tried before
 * the work, which may meet the first such row after hours. @throws MaskrouteError `invalid_data` as {@link encodeRow}.
 */
export function tryTemplate(rows: Iterable<CalibrationRow>, text: ModelText): void {
  const tried = new Set<string>();
  for (const row of rows) {
    if (row.content.type === 'text' || tried.has(rolesOf(row.content.turns))) continue;
    tried.add(rolesOf(row.content.turns));
    encodeRow(row, text, 0);
  }
}

/** The position that predicts the first token of a row's answer; `undefined` for a row without one. */
function answerStart({ content }: CalibrationRow, text: ModelText): number | undefined {
  if (content.type === 'text' || content.turns.at(-1)!.role !== 'assistant') return undefined;
  return text.encodeChat(content.turns.slice(0, -1)).length - 1;
}

/** What the template writes before any user's first word (often a default system prompt). */
function templatePrefix(text: ModelText): Int32Array {
  const [a, b] = ['A', 'zebra'].map((content) => text.encodeChat([{ role: 'user', content }]));
  return a!.slice(0, commonLength(a!, b!));
}

/** Tokens that both begin with. */
export function commonLength(a: Int32Array, b: Int32Array): number {
  let length = 0;
  while (length < Math.min(a.length, b.length) && a[length] === b[length]) length++;
  return length;
}

/**
 * The share of all prompts that nothing is learned from, neither masks nor surrogates. All parts share the number: with
 * another share, one part would learn on what another holds out.
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

/** What a smaller `share` holds out, a larger one does, too. */
export function isHeldOut({ routeText }: CalibrationRow, share: number, purpose = 'held-out'): boolean {
  const digest = createHash('sha256').update(`${purpose}\n${routeText}`).digest();
  return digest.readUInt32LE() / 2 ** 32 < share;
}

/** Each row once: what stands twice in the data must not count twice. */
export function distinctRows(rows: readonly CalibrationRow[]): CalibrationRow[] {
  const seen = new Set<string>();
  return rows.filter(({ content }) => {
    const digest = createHash('sha256').update(JSON.stringify(content)).digest('base64');
    if (seen.has(digest)) return false;
    seen.add(digest);
    return true;
  });
}
