/**
 * Calibration rows as the token sequences that the model would see, rendered through its chat template; and which rows
 * are held out. The split is by content: equal prompts are always on the same side, and reordering rows changes
 * nothing.
 */
import { createHash } from 'node:crypto';
import { LRUCache } from 'lru-cache';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { permutation, type Random } from '../../random.ts';
import { type CalibrationRow, divideRows, type Turn } from './read-data.ts';

export type Sample = {
  readonly tokenIds: Int32Array;
  /** The first scored position; the tokens before it are context, often the same in many conversations. */
  readonly scoreFrom: number;
};

type SampleOptions = {
  /** Scored positions wanted in all; fewer when the rows end before. */
  readonly positions: number;
  /** Tokens of one sequence beside its system prompt, cut at the end: many short texts tell more than one long one. */
  readonly tokensMax: number;
  /** The model's: most tokens of one sequence with its system prompt. */
  readonly contextTokens: number;
  readonly scored?: Scored;
};

/**
 * Most tokens of a system prompt; of a longer one the middle is left out. With `learn`'s tokens it fills a part of a training step,
 * which holds one sequence at least.
 */
const SYSTEM_TOKENS_MAX = 256;
/** System prompts whose tokens are remembered. */
const BEGINNINGS_MAX = 64;

/** Which positions of a row are scored: only its answer, or all behind the system prompt, its own or the template's. */
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
  { positions, ...options }: SampleOptions,
): SampledRow[] {
  const sampleOf = createSampler(text, eosTokenId, options);
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

/**
 * Returns a function that makes one row's sample, or `undefined` when the row is too short to score. A system prompt is context:
 * the row's other text is as long as without one, and the scored positions begin behind it. Requests repeat a system prompt, so
 * scored it would be most of what masks are made for; left out, masks would be made for another context.
 */
export function createSampler(
  text: ModelText,
  eosTokenId: number,
  { tokensMax, contextTokens, scored = 'all' }: Omit<SampleOptions, 'positions'>,
): (row: CalibrationRow) => Sample | undefined {
  const beginningOf = beginningReader(text);
  return (row) => {
    const whole = encodeRow(row, text, eosTokenId);
    const begun = row.content.type === 'chat' ? commonLength(whole, beginningOf(row.content.turns)) : 0;
    const from = scored === 'answers' ? (answerStart(row, text) ?? begun) : begun;
    const added = begun === 0 ? 0 : Math.max(0, begun - beginningOf([]).length);
    const dropped = Math.max(0, added - SYSTEM_TOKENS_MAX);
    const length = Math.min(tokensMax + added - dropped, contextTokens);
    const tokenIds = withoutMiddle(whole, begun, dropped).slice(0, length);
    const sample = { tokenIds, scoreFrom: from - dropped };
    return scoredPositions(sample) < 1 ? undefined : sample;
  };
}

/** Without `count` tokens in the middle of the first `end`. */
function withoutMiddle(tokenIds: Int32Array, end: number, count: number): Int32Array {
  const head = Math.ceil((end - count) / 2);
  return Int32Array.from([...tokenIds.subarray(0, head), ...tokenIds.subarray(head + count)]);
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

/**
 * {@link encodeRow} without the row's system prompt, where every token counts: many rows may have the same one, which would be most
 * of the text.
 */
export function encodeWithoutSystem(row: CalibrationRow, text: ModelText, eosTokenId: number): Int32Array {
  const { content } = row;
  const turns = content.type === 'chat' ? content.turns : [];
  const { length } = systemTurns(turns);
  if (length === 0) return encodeRow(row, text, eosTokenId);
  return orEmptySystem(turns.slice(length), (rest) =>
    encodeRow({ ...row, content: { type: 'chat', turns: rest } }, text, eosTokenId),
  );
}

/** Some templates refuse a conversation without a system prompt. There it has an empty one. */
function orEmptySystem(turns: readonly Turn[], encode: (turns: readonly Turn[]) => Int32Array): Int32Array {
  try {
    return encode(turns);
  } catch (error) {
    if (!(error instanceof MaskrouteError)) throw error;
    return encode([{ role: 'system', content: '' }, ...turns]);
  }
}

/** The system prompt of a conversation, which has other turns, too, or is empty. */
function systemTurns(turns: readonly Turn[]): readonly Turn[] {
  const end = turns.findIndex(({ role }) => role !== 'system');
  return turns.slice(0, end);
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

/**
 * Returns a function for what the template writes before a conversation's first other word: its system prompt, or often a default
 * one.
 */
function beginningReader(text: ModelText): (turns: readonly Turn[]) => Int32Array {
  const known = new LRUCache<string, Int32Array>({ max: BEGINNINGS_MAX });
  const read = (system: readonly Turn[]) => {
    const [a, b] = ['A', 'zebra'].map((content) =>
      orEmptySystem([...system, { role: 'user', content }], (turns) => text.encodeChat(turns)),
    );
    return a!.slice(0, commonLength(a!, b!));
  };
  return (turns) => {
    const system = systemTurns(turns);
    const key = JSON.stringify(system);
    const beginning = known.get(key) ?? read(system);
    known.set(key, beginning);
    return beginning;
  };
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

/**
 * About `share` of the prompts go to `heldOut`; another `purpose` divides them independently. In steps, as {@link divideRows}.
 */
export function* splitRows(
  rows: readonly CalibrationRow[],
  share: number,
  purpose = 'held-out',
): Generator<void, Split> {
  const [heldOut, fit] = yield* divideRows(rows, (row) => isHeldOut(row, share, purpose));
  return { fit, heldOut };
}

/** Whether a row is held out. A larger `share` also holds out everything that a smaller share does. */
export function isHeldOut({ routeText }: CalibrationRow, share: number, purpose = 'held-out'): boolean {
  const digest = createHash('sha256').update(`${purpose}\n${routeText}`).digest();
  return digest.readUInt32LE() / 2 ** 32 < share;
}
