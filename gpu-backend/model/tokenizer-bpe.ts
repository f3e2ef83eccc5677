/** Byte-level byte-pair encoding (GPT-2's kind, `tokenizer.ggml.model` = gpt2) as tokenizer.json parts. */
import type { GgufValue } from './gguf-header.ts';
import { quoted } from './gguf-header.ts';
import { corruptModel } from './model-errors.ts';
import type { PreTokenizerJson } from './pre-tokenizers.ts';
import { preTokenizerJson, preTokenizerKind } from './pre-tokenizers.ts';
import type { Vocabulary } from './vocabulary.ts';
import { stringArray } from './vocabulary.ts';

export type ByteLevelBpe = {
  readonly model: unknown;
  readonly preTokenizer: PreTokenizerJson;
  /** Whether tokenizers of this kind put BOS first unless the file says otherwise. */
  readonly addBos: boolean;
};

export function byteLevelBpe(metadata: ReadonlyMap<string, GgufValue>, vocabulary: Vocabulary): ByteLevelBpe {
  const pre = metadata.get('tokenizer.ggml.pre');
  const kind = preTokenizerKind(typeof pre === 'string' ? pre : undefined);
  return {
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: kind.ignoreMerges,
      vocab: Object.fromEntries(vocabulary.idOf),
      merges: readMerges(metadata, vocabulary),
    },
    preTokenizer: preTokenizerJson(kind),
    addBos: kind.addBos,
  };
}

/** Pairs in order of rank. A merge into a token that does not exist would make text vanish. */
function readMerges(
  metadata: ReadonlyMap<string, GgufValue>,
  vocabulary: Vocabulary,
): (readonly [string, string])[] {
  return stringArray(metadata, 'tokenizer.ggml.merges').map((merge) => {
    const space = merge.indexOf(' ', 1);
    const left = merge.slice(0, Math.max(space, 0));
    const right = merge.slice(space + 1);
    if (space < 1 || right === '' || !vocabulary.idOf.has(left + right)) {
      throw corruptModel(`the merge ${quoted(merge)} gives no token of its vocabulary`);
    }
    return [left, right] as const;
  });
}
