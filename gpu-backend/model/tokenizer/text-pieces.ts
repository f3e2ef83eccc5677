/**
 * Normalizers and pre-tokenizers: how a tokenizer changes text and splits it before it looks for tokens.
 *
 * @huggingface/tokenizers implements all normalizers exactly, except for SentencePiece's table of replacements
 * (`Precompiled`), which it approximates by NFKC. So this file reads the table (Hugging Face's spm_precompiled: a double
 * array of the replaced texts, Aoe 1989, followed by the replacements).
 */
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers';
import { unsupportedModel } from '../model-source.ts';

export type Normalizer = { normalize(text: string): string };

type NormalizerJson = {
  readonly type: string;
  readonly normalizers?: readonly NormalizerJson[];
  readonly precompiled_charsmap?: string | null;
};

/** `json`: the `normalizer` of a tokenizer.json. @throws Error for an unknown normalizer. */
export function createNormalizer(json: unknown, config: object): Normalizer | null {
  if (json === null || json === undefined) return null;
  const part = json as NormalizerJson;
  if (part.type === 'Sequence' && hasTable(part)) {
    const parts = (part.normalizers ?? []).map((inner) => createNormalizer(inner, config));
    return {
      normalize: (text) => parts.reduce<string>((done, inner) => inner?.normalize(done) ?? done, text),
    };
  }
  if (part.type === 'Precompiled') {
    const table = part.precompiled_charsmap;
    return table ? precompiled(Buffer.from(table, 'base64')) : null;
  }
  const files = { model: { type: 'BPE', vocab: {}, merges: [] }, added_tokens: [], normalizer: part };
  const rest = { pre_tokenizer: null, post_processor: null, decoder: null };
  return new LibraryTokenizer({ ...files, ...rest }, config).normalizer;
}

const hasTable = ({ type, normalizers = [] }: NormalizerJson): boolean =>
  type === 'Precompiled' || normalizers.some(hasTable);

const TABLE_BYTES_MAX = 16 * 1024 * 1024;

/** The normalizer of SentencePiece's table. @throws Error when `bytes` are no table. */
function precompiled(bytes: Uint8Array): Normalizer {
  const size = bytes.length >= 4 ? new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true) : 0;
  if (size === 0 || size % 4 !== 0 || size > bytes.length - 4 || bytes.length > TABLE_BYTES_MAX) {
    throw new Error('its table of replacements is damaged');
  }
  const units = new Uint32Array(Uint8Array.from(bytes.subarray(4, 4 + size)).buffer);
  const replacements = bytes.subarray(4 + size);
  const segmenter = new Intl.Segmenter('und', { granularity: 'grapheme' });
  const known = new Map<string, string | undefined>();
  const replaced = (text: string): string | undefined => {
    if (known.has(text)) return known.get(text);
    const found = lookUp(units, replacements, utf8.encode(text));
    if (known.size < REMEMBERED_MAX) known.set(text, found);
    return found;
  };
  const byGraphemes = (text: string): string => {
    let out = '';
    for (const { segment } of segmenter.segment(text)) {
      const whole = utf8.encode(segment).length < GRAPHEME_BYTES_MAX ? replaced(segment) : undefined;
      if (whole !== undefined) out += whole;
      else for (const character of segment) out += replaced(character) ?? character;
    }
    return out;
  };
  // An ASCII letter between two others is a grapheme of its own, and no known table replaces one, so ASCII is skipped.
  const isPlain = Array.from({ length: 95 }, (_, i) => String.fromCharCode(32 + i)).every(
    (letter) => replaced(letter) === undefined,
  );
  if (!isPlain) return { normalize: byGraphemes };
  return { normalize: (text) => text.replace(BESIDE_OTHERS, byGraphemes) };
}

/** Runs of other characters than printable ASCII, with the letter before, which may have an accent. */
const BESIDE_OTHERS = /[\x20-\x7e]?[^\x20-\x7e]+/g;

const utf8 = new TextEncoder();
/** Longer graphemes are replaced character by character. */
const GRAPHEME_BYTES_MAX = 6;
const REMEMBERED_MAX = 10_000;

/** The replacement of the shortest prefix of `key` in the table; undefined when there is none. */
function lookUp(units: Uint32Array, replacements: Uint8Array, key: Uint8Array): string | undefined {
  const unitAt = (at: number) => units[at] ?? 0;
  const offset = (unit: number) => (unit >>> 10) << ((unit & 0x200) >>> 6);
  let at = offset(unitAt(0));
  for (const byte of key) {
    if (byte === 0) return undefined;
    at ^= byte;
    const unit = unitAt(at);
    if ((unit & 0x800000ff) !== byte) return undefined;
    at ^= offset(unit);
    if (((unit >>> 8) & 1) === 0) continue;
    const start = unitAt(at) & 0x7fffffff;
    const end = replacements.indexOf(0, start);
    return new TextDecoder().decode(replacements.subarray(start, end === -1 ? replacements.length : end));
  }
  return undefined;
}

/* The pre-tokenizer of unigrams: splits at white space, which is dropped, and before spaces, which become U+2581. */

type MetaspaceJson = {
  readonly type: string;
  readonly replacement?: string;
  readonly prepend_scheme?: string;
  readonly add_prefix_space?: boolean;
  readonly split?: boolean;
};

/** White space as Unicode and Rust define it. */
const WHITE_SPACE = /[\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;

/**
 * `parts`: `WhitespaceSplit` and `Metaspace`, in this order, each at most once. `isFirst`: whether the text is the beginning
 * of the encoded text. @throws Error for other parts.
 */
export function metaspaceCutter(
  parts: readonly MetaspaceJson[],
): (text: string, isFirst: boolean) => Iterable<string> {
  const drops = parts[0]?.type === 'WhitespaceSplit';
  const [metaspace, ...others] = drops ? parts.slice(1) : parts;
  if (others.length > 0 || (metaspace !== undefined && metaspace.type !== 'Metaspace')) {
    throw new Error(`it splits text by ${parts.map(({ type }) => type).join(', ')}`);
  }
  const scheme = metaspace?.prepend_scheme ?? (metaspace?.add_prefix_space === false ? 'never' : 'always');
  const mark = metaspace?.replacement ?? '\u2581';
  const splits = metaspace !== undefined && metaspace.split !== false;
  return function* (text, isFirst) {
    const pieces = drops ? text.split(WHITE_SPACE) : [text];
    for (const [i, piece] of pieces.entries()) {
      if (piece === '') continue;
      if (metaspace === undefined) {
        yield piece;
        continue;
      }
      const prepends = scheme === 'always' || (scheme === 'first' && isFirst && i === 0);
      const marked = piece.replaceAll(' ', mark);
      const word = prepends && !marked.startsWith(mark) ? mark + marked : marked;
      if (splits) yield* beginningWith(word, mark);
      else yield word;
    }
  };
}

/** Splits a text before every mark. */
function* beginningWith(text: string, mark: string): Generator<string> {
  for (let at = 0; at < text.length; ) {
    const following = text.indexOf(mark, at + 1);
    const end = following === -1 ? text.length : following;
    yield text.slice(at, end);
    at = end;
  }
}

/*
 * The pre-tokenizers of byte-level BPE, by their names in GGUF files (`tokenizer.ggml.pre`). The expressions are those of the
 * models' tokenizer.json, as quoted in llama.cpp's llama-vocab.cpp.
 *
 * All are written with `Split`, whose expressions @huggingface/tokenizers translates to the semantics of the original
 * engine. Its `Digits` and `ByteLevel` are not used to split, as they differ from the original: `Digits` has ASCII digits
 * only, and `ByteLevel` uses JavaScript's definition of white space.
 */

export type PreTokenizerJson = { readonly type: string; readonly [key: string]: unknown };

export const GPT2_PATTERN =
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const modern = (digits: string) =>
  `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;
const UPPER = '[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]';
const LOWER = '[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]';
const TEKKEN_PATTERN = `[^\\r\\n\\p{L}\\p{N}]?${UPPER}*${LOWER}+|[^\\r\\n\\p{L}\\p{N}]?${UPPER}+${LOWER}*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;

/** Each expression splits the pieces of the expression before. */
type Kind = {
  readonly patterns: readonly string[];
  /** A piece that is a token is taken as a whole, even if merges would not make it. */
  readonly ignoreMerges: boolean;
  readonly addBos: boolean;
  /** Whether text is normalized to NFC first; GGUF files do not say so. */
  readonly nfc?: true;
};

const gpt2: Kind = { patterns: [GPT2_PATTERN], ignoreMerges: false, addBos: false };
const digitsThenGpt2: Kind = { ...gpt2, patterns: ['\\p{N}', GPT2_PATTERN] };
const llama3: Kind = { patterns: [modern('\\p{N}{1,3}')], ignoreMerges: true, addBos: true };
const qwen2: Kind = { ...gpt2, patterns: [modern('\\p{N}')], nfc: true };
const dbrx: Kind = { ...gpt2, patterns: [modern('\\p{N}{1,3}')] };
const tekken: Kind = { patterns: [TEKKEN_PATTERN], ignoreMerges: true, addBos: true };

const KINDS: Readonly<Record<string, Kind>> = {
  'gpt-2': gpt2,
  'phi-2': gpt2,
  olmo: gpt2,
  mpt: gpt2,
  smollm: digitsThenGpt2,
  starcoder: digitsThenGpt2,
  refact: digitsThenGpt2,
  'command-r': digitsThenGpt2,
  codeshell: digitsThenGpt2,
  'minerva-7b': digitsThenGpt2,
  llama3,
  'llama-v3': llama3,
  'llama-bpe': llama3,
  falcon3: llama3,
  'falcon-h1': llama3,
  pixtral: llama3,
  qwen2,
  'deepseek-r1-qwen': qwen2,
  megrez: qwen2,
  stablelm2: qwen2,
  dbrx,
  'smaug-bpe': dbrx,
  'chatglm-bpe': dbrx,
  tekken,
};

/** @throws MaskrouteError `unsupported_model` for a kind that is missing or unknown. */
export function preTokenizerKind(name: string | undefined): Kind {
  const kind = name !== undefined && Object.hasOwn(KINDS, name) ? KINDS[name] : undefined;
  if (kind !== undefined) return kind;
  const what = name === undefined ? 'none' : JSON.stringify(name.slice(0, 60));
  throw unsupportedModel(`it names the pre-tokenizer ${what} (supported: ${Object.keys(KINDS).join(', ')})`);
}

export const splitPattern = (pattern: string): PreTokenizerJson => ({
  type: 'Split',
  pattern: { Regex: pattern },
  behavior: 'Isolated',
  invert: false,
});

export const byteLevelOnly: PreTokenizerJson = {
  type: 'ByteLevel',
  add_prefix_space: false,
  trim_offsets: true,
  use_regex: false,
};

export const preTokenizerJson = (kind: Kind): PreTokenizerJson => ({
  type: 'Sequence',
  pretokenizers: [...kind.patterns.map(splitPattern), byteLevelOnly],
});
