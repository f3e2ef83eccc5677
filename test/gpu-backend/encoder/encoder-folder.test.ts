import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readEncoderFolder } from '../../../gpu-backend/encoder/encoder-files.ts';
import { openEncoder } from '../../../gpu-backend/learning/data/encoders.ts';

const CONFIG = {
  model_type: 'bert',
  hidden_act: 'gelu',
  hidden_size: 8,
  intermediate_size: 16,
  num_attention_heads: 2,
  num_hidden_layers: 1,
  max_position_embeddings: 16,
  vocab_size: 5,
  layer_norm_eps: 1e-12,
};
const TOKENIZER = {
  normalizer: { type: 'BertNormalizer', lowercase: true },
  pre_tokenizer: { type: 'BertPreTokenizer' },
  model: { type: 'WordPiece', vocab: { b: 1, a: 0, '[UNK]': 2, '[CLS]': 3, '[SEP]': 4 } },
};

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-encoder-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

function write(config: object, tokenizer: object): Promise<unknown> {
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
  writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify(tokenizer));
  return readEncoderFolder(folder, '');
}

describe('the folder of a sentence encoder', () => {
  it('is read, its vocabulary in id order', async () => {
    await expect(write(CONFIG, TOKENIZER)).resolves.toMatchObject({
      wordPiece: { vocabulary: ['a', 'b', '[UNK]', '[CLS]', '[SEP]'] },
      pooling: 'mean',
      prefix: '',
      tokensMax: 16,
    });
  });

  it.each([
    ['another architecture', { ...CONFIG, model_type: 'roberta' }, TOKENIZER, /config\.json: model_type/],
    [
      'rotary positions',
      { ...CONFIG, position_embedding_type: 'rotary' },
      TOKENIZER,
      /position_embedding_type/,
    ],
    [
      'a cased tokenizer',
      CONFIG,
      { ...TOKENIZER, normalizer: { type: 'BertNormalizer', lowercase: false } },
      /normalizer/,
    ],
    [
      'a vocabulary of another size',
      CONFIG,
      { ...TOKENIZER, model: { vocab: { a: 0 } } },
      /has 1 tokens, not 5/,
    ],
    [
      'an id given twice',
      CONFIG,
      { ...TOKENIZER, model: { vocab: { a: 0, b: 0, c: 2, d: 3, e: 4 } } },
      /id 0 wrongly/,
    ],
  ])('with %s is refused', async (_, config, tokenizer, message) => {
    await expect(write(config, tokenizer)).rejects.toThrow(message);
  });

  it('without weights is refused, and so is a name that is nothing', async () => {
    await write(
      { ...CONFIG, vocab_size: 5 },
      {
        ...TOKENIZER,
        model: { vocab: { '[PAD]': 0, '[UNK]': 1, '[CLS]': 2, '[SEP]': 3, '[MASK]': 4 } },
      },
    );
    const options = { home: folder, threads: 1, hooks: { onProgress: () => {}, log: () => {} } };
    await expect(openEncoder(folder, options)).rejects.toThrow(/model\.safetensors cannot be read/);
    await expect(openEncoder('no-such-encoder', options)).rejects.toThrow(
      /neither all-minilm-l6-v2, bge.* nor hf:/,
    );
    await expect(openEncoder(join(folder, 'none.bin'), options)).rejects.toThrow(/none\.bin cannot be read/);
  });
});
