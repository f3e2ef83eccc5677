/**
 * The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json, the format that @huggingface/tokenizers
 * reads, and what else of it the server needs: which ids end an answer, the chat template.
 */
import type { GgufValue } from './gguf-header.ts';
import { quoted } from './gguf-header.ts';
import { corruptModel, unsupportedModel } from './model-errors.ts';
import { byteLevelBpe } from './tokenizer-bpe.ts';
import { sentencePiece } from './tokenizer-spm.ts';
import type { Vocabulary } from './vocabulary.ts';
import { readVocabulary } from './vocabulary.ts';

/** What goes into the store beside the graph. */
export type ImportedTokenizer = {
  readonly tokenizerJson: Readonly<Record<string, unknown>>;
  readonly tokenizerConfig: Readonly<Record<string, unknown>>;
  readonly chatTemplate: string | null;
  readonly bosTokenId: number | null;
  readonly eosTokenIds: readonly number[];
  readonly addBos: boolean;
};

type Metadata = ReadonlyMap<string, GgufValue>;

/** `rows`: the rows of the embedding, which no id may pass. @throws MaskrouteError as the readers do. */
export function tokenizerFromGguf(metadata: Metadata, rows: number): ImportedTokenizer {
  const kind = metadata.get('tokenizer.ggml.model');
  const vocabulary = readVocabulary(metadata, rows);
  switch (kind) {
    case 'gpt2': {
      const { model, preTokenizer, addBos } = byteLevelBpe(metadata, vocabulary);
      return assemble(metadata, vocabulary, addBos, {
        normalizer: null,
        pre_tokenizer: preTokenizer,
        decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
        model,
      });
    }
    case 'llama':
      return assemble(metadata, vocabulary, true, {
        pre_tokenizer: null,
        ...sentencePiece(metadata, vocabulary),
      });
    case undefined:
      throw unsupportedModel('it holds no tokenizer');
    default:
      throw unsupportedModel(`its tokenizer is of the kind ${quoted(String(kind))} (supported: gpt2, llama)`);
  }
}

type Parts = {
  readonly normalizer: unknown;
  readonly pre_tokenizer: unknown;
  readonly decoder: unknown;
  readonly model: unknown;
};

function assemble(
  metadata: Metadata,
  vocabulary: Vocabulary,
  addBosDefault: boolean,
  parts: Parts,
): ImportedTokenizer {
  const bos = specialId(metadata, vocabulary, 'bos');
  // `add_eos_token` is not honoured on purpose: a prompt that has ended is never continued.
  const wantsBos = metadata.get('tokenizer.ggml.add_bos_token') ?? addBosDefault;
  const addBos = wantsBos === true && bos !== null;
  const eosTokenIds = endOfAnswerIds(metadata, vocabulary);
  const token = (id: number | null) => (id === null ? null : vocabulary.tokens[id]!);
  return {
    tokenizerJson: {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: vocabulary.added.map(addedToken),
      ...parts,
      post_processor: addBos ? prefixWith(bos!, token(bos)!) : null,
    },
    tokenizerConfig: {
      add_bos_token: addBos,
      bos_token: token(bos),
      eos_token: token(eosTokenIds[0]!),
      unk_token: token(specialId(metadata, vocabulary, 'unknown')),
      clean_up_tokenization_spaces: false,
      tokenizer_class: 'PreTrainedTokenizerFast',
    },
    chatTemplate: textOrNull(metadata.get('tokenizer.chat_template')),
    bosTokenId: bos,
    eosTokenIds,
    addBos,
  };
}

const addedToken = (token: Vocabulary['added'][number]) => ({
  id: token.id,
  content: token.content,
  single_word: false,
  lstrip: false,
  rstrip: false,
  normalized: false,
  special: token.special,
});

const prefixWith = (id: number, content: string) => ({
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: content, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [
    { SpecialToken: { id: content, type_id: 0 } },
    { Sequence: { id: 'A', type_id: 0 } },
    { SpecialToken: { id: content, type_id: 1 } },
    { Sequence: { id: 'B', type_id: 1 } },
  ],
  special_tokens: { [content]: { id: content, ids: [id], tokens: [content] } },
});

/** Files rarely name all tokens that end a turn; these names always do (llama.cpp's list, llama-vocab.cpp). */
const END_OF_ANSWER_NAMES = new Set([
  '<|eot_id|>',
  '<|im_end|>',
  '<|end|>',
  '<|return|>',
  '<|call|>',
  '<end_of_turn>',
  '<|endoftext|>',
  '<|eom_id|>',
  '<EOT>',
  '_<EOT>',
  '<|end_of_text|>',
  '<end_of_utterance>',
  '<eos>',
  '</s>',
]);

export const isEndOfAnswerName = (name: string): boolean => END_OF_ANSWER_NAMES.has(name);

function endOfAnswerIds(metadata: Metadata, vocabulary: Vocabulary): number[] {
  const ids = new Set<number>();
  for (const kind of ['eos', 'eot', 'eom']) {
    const id = specialId(metadata, vocabulary, kind);
    if (id !== null) ids.add(id);
  }
  for (const token of vocabulary.added) if (END_OF_ANSWER_NAMES.has(token.content)) ids.add(token.id);
  if (ids.size === 0) throw unsupportedModel('it names no token that ends an answer');
  return [...ids];
}

function specialId(metadata: Metadata, vocabulary: Vocabulary, kind: string): number | null {
  const key = `tokenizer.ggml.${kind}_token_id`;
  const value = metadata.get(key);
  if (value === undefined) return null;
  const id = Number(value);
  if (!Number.isInteger(id) || id < 0 || id >= vocabulary.tokens.length) {
    throw corruptModel(`${key} is ${quoted(String(value))}, not a token of its vocabulary`);
  }
  return id;
}

const textOrNull = (value: unknown): string | null =>
  typeof value === 'string' && value !== '' ? value : null;
