/**
 * How text is cut before byte-pair merging, by the names that GGUF files give (`tokenizer.ggml.pre`). Expressions
 * are those of the models' own tokenizer.json, as llama.cpp's llama-vocab.cpp quotes them.
 *
 * Everything is written with `Split`, whose expressions @huggingface/tokenizers translates to the semantics of
 * the original engine. Its `Digits` knows ASCII digits only and its `ByteLevel` expression JavaScript's idea of
 * white space, so neither is used for cutting.
 */
import { unsupportedModel } from '../model-source.ts';

export type PreTokenizerJson = { readonly type: string; readonly [key: string]: unknown };

export const GPT2_PATTERN =
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const modern = (digits: string) =>
  `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;
const UPPER = '[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]';
const LOWER = '[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]';
const TEKKEN_PATTERN = `[^\\r\\n\\p{L}\\p{N}]?${UPPER}*${LOWER}+|[^\\r\\n\\p{L}\\p{N}]?${UPPER}+${LOWER}*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;

/** Each expression cuts the pieces that the one before left. */
type Kind = {
  readonly patterns: readonly string[];
  /** A piece that is a token as it stands is taken whole, whatever the merges say. */
  readonly ignoreMerges: boolean;
  readonly addBos: boolean;
  /** Letters with their accents become one before all else; GGUF files do not say so. */
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
