/** A whole installed model that is learned on in seconds: random weights, a token for every byte, a chat template. */
import { mkdir, writeFile } from 'node:fs/promises';
import { MANIFEST_FORMAT, type ModelConfig, type WeightKind } from '../../gpu-backend/model/model-source.ts';
import type { InstalledModel } from '../../gpu-backend/model/store.ts';
import { BYTE_CHARACTERS } from './bytes.ts';
import { emitFromMemory, randomLlama } from './random-llama.ts';

const SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'];
const CHAT_TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/** No weights have it. */
export const TINY_HASH = 'a'.repeat(64);

/** Writes it to `folder`. */
export async function installTinyModel(
  folder: string,
  weights: WeightKind,
  changes: Partial<ModelConfig> = {},
): Promise<InstalledModel> {
  await mkdir(folder, { recursive: true });
  const source = randomLlama({ tiedEmbeddings: false, ...changes });
  await emitFromMemory(source, weights, folder, () => {});
  await writeFile(`${folder}/tokenizer.json`, JSON.stringify(byteTokenizer()));
  const config = { bos_token: SPECIAL[1], eos_token: SPECIAL[2], tokenizer_class: 'PreTrainedTokenizerFast' };
  await writeFile(`${folder}/tokenizer_config.json`, JSON.stringify(config));
  return {
    folder,
    manifest: {
      format: MANIFEST_FORMAT,
      name: 'tiny',
      hash: TINY_HASH,
      source: 'test',
      weights,
      config: source.config,
      chatTemplate: CHAT_TEMPLATE,
      bosTokenId: null,
      eosTokenIds: [2],
      addBos: false,
      files: {},
      importedAt: '2026-01-01T00:00:00.000Z',
    } as InstalledModel['manifest'],
  };
}

/** Byte-level BPE without merges. */
function byteTokenizer(): object {
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: SPECIAL.map((content, id) => ({
      id,
      content,
      special: true,
      normalized: false,
      single_word: false,
      lstrip: false,
      rstrip: false,
    })),
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries([...SPECIAL, ...BYTE_CHARACTERS].map((token, id) => [token, id])),
      merges: [],
    },
  };
}
