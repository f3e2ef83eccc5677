/**
 * Text to token ids and back. @huggingface/tokenizers does most of the work: it normalizes text, and splits it into words
 * and words into tokens. This file does it word by word, so that encoding a long prompt can pause, stop, or find out half-way
 * that it is too long. Special tokens in a text are plain text unless the caller allows them.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers';
import { LRUCache } from 'lru-cache';
import { finish } from '../../event-loop.ts';
import { createNormalizer, metaspaceCutter, type Normalizer } from './text-pieces.ts';
import type { TokenReader, TokenTable } from './token-bytes.ts';
import { BYTE_NAMES, createTokenReader, tokenTable, vocabularyOf } from './token-bytes.ts';
import { type BytePairsJson, bytePairEncoder, type UnigramJson, unigramEncoder } from './word-encoder.ts';

export const TOKENIZER_FILE = 'tokenizer.json';
export const TOKENIZER_CONFIG_FILE = 'tokenizer_config.json';

export type EncodeOptions = {
  /** Whether BOS is added if the model wants one. Default true. */
  readonly addSpecial?: boolean;
  /**
   * Whether special tokens that the text spells are encoded as these tokens, or as plain text. `within`: the same text, but
   * with other letters where no special token may be; special tokens are searched in it. Default false.
   */
  readonly parseSpecial?: boolean | { readonly within: string };
};

export type Tokenizer = TokenReader & {
  encode(text: string, options?: EncodeOptions): Int32Array;
  /** `encode` in steps of some milliseconds; each step yields the number of tokens so far. */
  encodeSteps(text: string, options?: EncodeOptions): Generator<number, Int32Array>;
  /** The text, special tokens included. */
  decode(tokenIds: ArrayLike<number>): string;
  /** The id of a token by its name, e.g. `<|im_end|>`. */
  tokenId(name: string): number | undefined;
  /** The bytes of all tokens, as plain data. */
  readonly table: TokenTable;
};

type TokenizerFiles = { readonly json: object; readonly config: object };

/** Reads a model's folder in the store. */
export async function readTokenizerFiles(folder: string): Promise<TokenizerFiles> {
  const [json, config] = await Promise.all(
    [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE].map(async (name) =>
      JSON.parse(await readFile(join(folder, name), 'utf8')),
    ),
  );
  return { json, config };
}

export async function loadTokenizer(folder: string): Promise<Tokenizer> {
  const { json, config } = await readTokenizerFiles(folder);
  return createTokenizer(json, config);
}

type AddedToken = {
  readonly id: number;
  readonly content: string;
  readonly special?: boolean;
  readonly normalized?: boolean;
  readonly lstrip?: boolean;
  readonly rstrip?: boolean;
  /** Not matched inside a word. */
  readonly single_word?: boolean;
};

type TokenizerJson = {
  readonly model: (BytePairsJson & { readonly type?: 'BPE' }) | UnigramJson;
  readonly normalizer?: unknown;
  readonly added_tokens?: readonly AddedToken[];
  readonly pre_tokenizer?: PreTokenizerPart | null;
};
type PreTokenizerPart = {
  readonly type: string;
  readonly pretokenizers?: readonly PreTokenizerPart[];
  readonly behavior?: string;
  readonly invert?: boolean;
  readonly use_regex?: boolean;
  readonly add_prefix_space?: boolean;
};

export const addedTokensOf = (json: object): readonly AddedToken[] =>
  ((json as TokenizerJson).added_tokens ?? []).filter(({ content }) => content !== '');

/**
 * Whether a token is a control token, which structures conversations. White space never is, whatever a file says, as
 * templates trim and add it.
 */
export const isControl = ({ special, content }: AddedToken): boolean =>
  special === true && content.trim() !== '';

/** Words of a step of `encodeSteps` together: what a word takes grows with its bytes of UTF-8, whatever its letters. */
const BYTES_A_STEP = 4096;

/**
 * A longer word is encoded in parts, since the library encodes a word at once, and takes about 12 ms for this many bytes.
 * Only such words may have other ids than the original has. In prose, code and base64 of programs the longest has 476;
 * base64 of zeros has longer ones.
 */
const WORD_BYTES_MAX = 10_000;
/** Characters and ids of words that are remembered: most words of a text come again. */
const REMEMBERED_MAX = 500_000;

/**
 * @param alsoControl names of added tokens that are control tokens, though the file does not mark them as special.
 * @param known the table of all tokens of `json`, from somebody who has it already.
 * @throws Error when @huggingface/tokenizers cannot read the files.
 */
export function createTokenizer(
  json: object,
  config: object,
  alsoControl: ReadonlySet<string> = new Set(),
  known?: TokenTable,
): Tokenizer {
  const { model, normalizer, pre_tokenizer } = json as TokenizerJson;
  const added = addedTokensOf(json);
  const control = added.filter((token) => isControl(token) || alsoControl.has(token.content));
  const others = added.filter((token) => !control.includes(token));
  const library = withoutVocabulary(json, config);
  const reserved = new Set(control.map(({ content }) => content));
  const names = vocabularyOf(json);
  const table = known ?? tokenTable(json, added, names);
  const vocabulary = new Map(names);
  const words =
    model.type === 'Unigram'
      ? unigramWords(model, pre_tokenizer, reserved)
      : bytePairWords(model, vocabulary, pre_tokenizer, reserved, library);
  const idsOf = remembering((word) => words.encode(word));
  const cut = createCutter(control, others, createNormalizer(normalizer, config));
  const idsOfAdded = new Map(added.map(({ content, id }) => [content, id]));
  const tokenId = (name: string) => idsOfAdded.get(name) ?? vocabulary.get(name);
  const frame = frameOf(library, tokenId);

  function* encodeSteps(text: string, options: EncodeOptions = {}): Generator<number, Int32Array> {
    const { addSpecial = true, parseSpecial = false } = options;
    const within = typeof parseSpecial === 'object' ? parseSpecial.within : parseSpecial ? text : undefined;
    const ids = addSpecial ? [...frame.before] : [];
    let bytes = 0;
    for (const { section, part } of cut(text, within)) {
      const all = typeof part === 'string' ? inParts(words.cut(part, section)) : [part];
      for (const word of all) {
        if (typeof word === 'string') for (const id of idsOf(word)) ids.push(id);
        else ids.push(word.id);
        bytes += Buffer.byteLength(typeof word === 'string' ? word : word.content);
        if (bytes < BYTES_A_STEP) continue;
        bytes = 0;
        yield ids.length;
      }
    }
    if (addSpecial) ids.push(...frame.after);
    return Int32Array.from(ids);
  }

  const reader = createTokenReader(table);
  return {
    ...reader,
    table,
    tokenId,
    encodeSteps,
    encode: (text, options) => finish(encodeSteps(text, options)),
    decode(tokenIds) {
      const decoder = reader.createDecoder({ showSpecial: true });
      const text = Array.from(tokenIds, (id) => decoder.push(id)).join('') + decoder.flush();
      // Drops the space that encoding adds. A stream continues a prompt, so it keeps its space.
      return table.leadingSpace && text.startsWith(' ') ? text.slice(1) : text;
    },
  };
}

type IdsOf = (word: string) => readonly number[];

/** Each word is encoded once, while it is remembered. */
function remembering(encode: IdsOf): IdsOf {
  const wordIds = new LRUCache<string, readonly number[]>({
    maxSize: REMEMBERED_MAX,
    sizeCalculation: (ids, word) => 1 + word.length + ids.length,
  });
  return (word) => {
    const known = wordIds.get(word);
    if (known !== undefined) return known;
    // A part of a text would keep all of the text in memory.
    const copy = Buffer.from(word, 'utf16le').toString('utf16le');
    const ids = encode(copy);
    wordIds.set(copy, ids);
    return ids;
  };
}

/** Cuts long words, but no character. */
function* inParts(words: Iterable<string>): Generator<string> {
  for (const word of words) {
    let from = 0;
    // A unit of UTF-16 has three bytes at most.
    if (3 * word.length > WORD_BYTES_MAX) {
      let bytes = 0;
      let at = 0;
      for (const character of word) {
        const size = Buffer.byteLength(character);
        if (bytes + size > WORD_BYTES_MAX) {
          yield word.slice(from, at);
          [from, bytes] = [at, 0];
        }
        bytes += size;
        at += character.length;
      }
    }
    yield word.slice(from);
  }
}

type Words = {
  /** Splits text into words, lazily. `section`: the number of sections before this text. */
  cut(text: string, section: number): Iterable<string>;
  encode(word: string): readonly number[];
};

function bytePairWords(
  model: BytePairsJson,
  vocabulary: ReadonlyMap<string, number>,
  preTokenizer: PreTokenizerPart | null | undefined,
  reserved: ReadonlySet<string>,
  library: LibraryTokenizer,
): Words {
  const splits = splitsOf(preTokenizer);
  const letter = splits && BYTE_NAMES.find((name) => reserved.has(name));
  if (letter !== undefined) throw new Error(`its special token ${letter} is a letter of its alphabet`);
  const encode = bytePairEncoder(model, vocabulary, reserved);
  if (splits !== undefined)
    return { cut: (text) => cutWords(text, splits), encode: (word) => encode(inByteNames(word)) };
  const cutAtSeams = seamCutter([...vocabulary.keys()], reserved);
  return {
    *cut(text, section) {
      const pieces = library.pre_tokenizer?.pre_tokenize(text, { section_index: section }) ?? [text];
      for (const piece of pieces) yield* cutAtSeams(piece);
    },
    encode,
  };
}

const inByteNames = (word: string): string =>
  Array.from(new TextEncoder().encode(word), (byte) => BYTE_NAMES[byte]).join('');

function unigramWords(
  model: UnigramJson,
  preTokenizer: PreTokenizerPart | null | undefined,
  reserved: ReadonlySet<string>,
): Words {
  const cut = metaspaceCutter(flat(preTokenizer));
  const names = model.vocab.map(([piece]) => piece);
  const cutAtSeams = seamCutter(names, reserved);
  return {
    *cut(text, section) {
      for (const piece of cut(text, section === 0)) yield* cutAtSeams(piece);
    },
    encode: unigramEncoder(model, reserved),
  };
}

/** The library without a vocabulary: for the parts that work on text. */
const withoutVocabulary = (json: object, config: object): LibraryTokenizer =>
  new LibraryTokenizer(
    {
      pre_tokenizer: null,
      post_processor: null,
      decoder: null,
      ...json,
      normalizer: null,
      model: { type: 'BPE', vocab: {}, merges: [] },
      added_tokens: [],
    },
    config,
  );

/** The tokens that the post-processor adds before and after every text. */
function frameOf(library: LibraryTokenizer, tokenId: (name: string) => number | undefined) {
  const text = '\0';
  const framed = library.post_processor?.post_process([text], null, true).tokens ?? [text];
  const at = framed.indexOf(text);
  const ids = (names: readonly string[]) => names.flatMap((name) => tokenId(name) ?? []);
  return { before: ids(framed.slice(0, at)), after: ids(framed.slice(at + 1)) };
}

/** The expressions of a pre-tokenizer that only splits by expressions before byte-level BPE; undefined for others. */
function splitsOf(json: PreTokenizerPart | null | undefined): readonly RegExp[] | undefined {
  const parts = flat(json);
  const last = parts.pop();
  if (last?.type !== 'ByteLevel' || last.use_regex !== false || last.add_prefix_space === true)
    return undefined;
  const patterns = parts.map((part) => {
    if (part.type !== 'Split' || part.behavior !== 'Isolated' || part.invert === true) return null;
    const split = withoutVocabulary({ pre_tokenizer: part }, {}).pre_tokenizer;
    return (split as { pattern?: RegExp | null } | null)?.pattern ?? null;
  });
  return patterns.every((pattern) => pattern !== null) ? patterns : undefined;
}

const flat = (json: PreTokenizerPart | null | undefined): PreTokenizerPart[] =>
  json?.type === 'Sequence' ? (json.pretokenizers ?? []).flatMap(flat) : json ? [json] : [];

/** Splits into the matches of an expression and the text between them, and each of these by the next expressions. */
function* cutWords(text: string, [split, ...rest]: readonly RegExp[]): Generator<string> {
  if (split === undefined) return yield text;
  let at = 0;
  for (const { 0: found, index } of text.matchAll(split)) {
    if (index > at) yield* cutWords(text.slice(at, index), rest);
    if (found !== '') yield* rest.length === 0 ? [found] : cutWords(found, rest);
    at = index + found.length;
  }
  if (at < text.length) yield* cutWords(text.slice(at), rest);
}

/**
 * Splits text between two characters that are neighbours in no token of text: no token reaches over, so the ids are those of
 * the whole text. One of the two has to be a token itself, as unknown characters in a row become one token.
 */
function seamCutter(
  names: readonly string[],
  reserved: ReadonlySet<string>,
): (text: string) => Iterable<string> {
  const tokens = new Set(names.filter((name) => !reserved.has(name)));
  // Numbers instead of texts, as a large vocabulary has millions of pairs.
  const pairAt = (text: string, at: number) => text.charCodeAt(at - 1) * 0x1_0000 + text.charCodeAt(at);
  const neighbours = new Set<number>();
  for (const token of tokens) for (let i = 1; i < token.length; i++) neighbours.add(pairAt(token, i));
  return function* (text) {
    let from = 0;
    for (let at = 1; at < text.length; at++) {
      if (neighbours.has(pairAt(text, at)) || !(tokens.has(text[at - 1]!) || tokens.has(text[at]!))) continue;
      yield text.slice(from, at);
      from = at;
    }
    yield text.slice(from);
  };
}

type Section = { readonly section: number; readonly part: string | AddedToken };
type Cutter = (text: string, within: string | undefined) => Iterable<Section>;

/**
 * Splits a text at added tokens, before normalization; the leftmost and longest match comes first. Control tokens are
 * searched in `within`, other added tokens in the whole text, whoever wrote it. The text between is normalized here, as
 * some added tokens are searched in normalized text.
 */
function createCutter(
  control: readonly AddedToken[],
  others: readonly AddedToken[],
  normalizer: Normalizer | null,
): Cutter {
  const isNormalized = ({ normalized, special }: AddedToken) => normalized ?? special !== true;
  const findControl = createFinder(control.map((token) => [token.content, token]));
  const findOther = createFinder(
    others.filter((token) => !isNormalized(token)).map((token) => [token.content, token]),
  );
  const findNormalized = createFinder(
    others
      .filter(isNormalized)
      .map((token) => [normalizer?.normalize(token.content) ?? token.content, token]),
  );
  return function* (text, within) {
    const sections = cutOut(text, [
      [findControl, within],
      [findOther, text],
    ]);
    for (const [section, part] of sections.entries()) {
      if (typeof part !== 'string') {
        yield { section, part };
        continue;
      }
      const normalized = normalizer === null || part === '' ? part : normalizer.normalize(part);
      for (const inner of cutOut(normalized, [[findNormalized, normalized]])) {
        if (inner !== '') yield { section, part: inner };
      }
    }
  };
}

type Found = { readonly index: number; readonly end: number; readonly token: AddedToken };
type Finder = (text: string, from: number) => Found | undefined;

/** An expression that matches any of the texts, the leftmost and longest first; without texts, it matches nothing. */
export function anyOf(texts: readonly string[]): RegExp {
  const longestFirst = [...texts].sort((a, b) => b.length - a.length);
  return new RegExp(texts.length === 0 ? '(?!)' : longestFirst.map(literally).join('|'), 'g');
}

/** A text as a regular expression, with every character escaped. */
const literally = (text: string): string =>
  Array.from(
    { length: text.length },
    (_, i) => `\\u${text.charCodeAt(i).toString(16).padStart(4, '0')}`,
  ).join('');

function createFinder(entries: readonly (readonly [string, AddedToken])[]): Finder {
  if (entries.length === 0) return () => undefined;
  const tokens = new Map(entries);
  const pattern = anyOf([...tokens.keys()]);
  return (text, from) => {
    pattern.lastIndex = from;
    for (let match = pattern.exec(text); match !== null; match = pattern.exec(text)) {
      const token = tokens.get(match[0])!;
      const [index, end] = [match.index, pattern.lastIndex];
      if (token.single_word !== true || !touchesWord(text, index, end)) return { index, end, token };
    }
    return undefined;
  };
}

/** A letter, mark, digit or connector: Rust's `\w`. */
const WORD = '[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]';
const [ENDS_WITH_WORD, BEGINS_WITH_WORD] = [new RegExp(`${WORD}$`, 'u'), new RegExp(`^${WORD}`, 'u')];

/** Whether a word character is next to the part from `index` to `end`. */
const touchesWord = (text: string, index: number, end: number): boolean =>
  ENDS_WITH_WORD.test(text.slice(Math.max(0, index - 2), index)) ||
  BEGINS_WITH_WORD.test(text.slice(end, end + 2));

function cutOut(
  text: string,
  searches: readonly (readonly [Finder, string | undefined])[],
): (string | AddedToken)[] {
  const next = searches.map(([find, where]) => (where === undefined ? undefined : find(where, 0)));
  const parts: (string | AddedToken)[] = [];
  let at = 0;
  for (let found = firstOf(next); found !== undefined; found = firstOf(next)) {
    if (found.index > at) parts.push(text.slice(at, found.index));
    parts.push(found.token);
    at = found.end;
    searches.forEach(([find, where], i) => {
      const known = next[i];
      if (known !== undefined && known.index < at) next[i] = find(where!, at);
    });
  }
  if (at < text.length) parts.push(text.slice(at));
  parts.forEach((part, i) => {
    if (typeof part === 'string') return;
    const [before, after] = [parts[i - 1], parts[i + 1]];
    if (part.lstrip && typeof before === 'string') parts[i - 1] = before.trimEnd();
    if (part.rstrip && typeof after === 'string') parts[i + 1] = after.trimStart();
  });
  return parts;
}

const firstOf = (candidates: readonly (Found | undefined)[]): Found | undefined =>
  candidates.reduce((best, one) => {
    if (one === undefined || best === undefined) return one ?? best;
    const isBetter = one.index < best.index || (one.index === best.index && one.end > best.end);
    return isBetter ? one : best;
  }, undefined);
