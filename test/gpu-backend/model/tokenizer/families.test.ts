/** The families' real tokenizers on nasty text, from tokenizer.json and from GGUF metadata, against Hugging Face's. */
import { readFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import type { GgufValue } from '../../../../gpu-backend/model/formats/gguf-header.ts';
import { tokenizerFromGguf } from '../../../../gpu-backend/model/tokenizer/gguf-tokenizer.ts';
import { tokenizerFromFolder } from '../../../../gpu-backend/model/tokenizer/hf-tokenizer.ts';
import { createTokenizer, type Tokenizer } from '../../../../gpu-backend/model/tokenizer/tokenizer.ts';
import {
  byteLevelMetadata,
  gpt2Files,
  lenmlFiles,
  llama2Files,
  sentencePieceMetadata,
  type TokenizerJson,
} from '../../../support/tokenizer-files.ts';

type Ids = number[];
const figures: {
  texts: string[];
  plain: Record<string, Ids[]>;
  parsed: Record<string, Record<string, Ids>>;
} = JSON.parse(readFileSync(new URL('fixtures/families.json', import.meta.url), 'utf8'));

const ROWS = 160_000;

async function fromFolder(files: { json: TokenizerJson; config: object }): Promise<Tokenizer> {
  const folder = await mkdtemp(path.join(tmpdir(), 'maskroute-tokenizer-'));
  try {
    await writeFile(path.join(folder, 'tokenizer.json'), JSON.stringify(files.json));
    await writeFile(path.join(folder, 'tokenizer_config.json'), JSON.stringify(files.config));
    await writeFile(path.join(folder, 'config.json'), '{}');
    return stored(await tokenizerFromFolder(folder, ROWS));
  } finally {
    await rm(folder, { recursive: true });
  }
}
const fromMetadata = async (metadata: Map<string, GgufValue>) => stored(tokenizerFromGguf(metadata, ROWS));

/** Through text, as the store keeps it. */
const stored = ({ tokenizerJson, tokenizerConfig }: { tokenizerJson: object; tokenizerConfig: object }) =>
  createTokenizer(JSON.parse(JSON.stringify(tokenizerJson)), tokenizerConfig);

describe.each<[string, string, () => Promise<Tokenizer>]>([
  ['Llama 3.1, tokenizer.json', 'llama3', () => fromFolder(lenmlFiles('llama3_1'))],
  ['Llama 3.1, GGUF', 'llama3', () => fromMetadata(byteLevelMetadata(lenmlFiles('llama3_1'), 'llama-bpe'))],
  ['Qwen3, tokenizer.json', 'qwen3', () => fromFolder(lenmlFiles('qwen3'))],
  ['Qwen3, GGUF', 'qwen3', () => fromMetadata(byteLevelMetadata(lenmlFiles('qwen3'), 'qwen2'))],
  ['GPT-2, tokenizer.json', 'gpt2', () => fromFolder(gpt2Files())],
  ['GPT-2, GGUF', 'gpt2', () => fromMetadata(byteLevelMetadata(gpt2Files(), 'gpt-2'))],
  ['Llama 2, tokenizer.json', 'llama2', () => fromFolder(llama2Files())],
  ['Llama 2, GGUF', 'llama2', () => fromMetadata(sentencePieceMetadata(llama2Files().json.model.vocab))],
  ['Mistral, tokenizer.json', 'mistral', () => fromFolder(lenmlFiles('llama2'))],
  [
    'Mistral, GGUF',
    'mistral',
    () => fromMetadata(sentencePieceMetadata(lenmlFiles('llama2').json.model.vocab)),
  ],
])('%s', (_, family, open) => {
  test('gives the reference’s ids; special tokens of a text are text, or tokens where they may be', async () => {
    const tokenizer = await open();
    const encode = (text: string, parseSpecial: boolean) => [
      ...tokenizer.encode(text, { addSpecial: false, parseSpecial }),
    ];
    const plain = figures.plain[family]!;
    const parsed = plain.map((ids, i) => figures.parsed[family]![i] ?? ids);
    const named = (all: Ids[]) => all.map((ids, i) => [figures.texts[i], ids.join()]);
    expect(named(figures.texts.map((text) => encode(text, false)))).toEqual(named(plain));
    expect(named(figures.texts.map((text) => encode(text, true)))).toEqual(named(parsed));
    expect(figures.texts.length).toBeGreaterThan(80);
  });
});
