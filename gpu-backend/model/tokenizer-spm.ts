/**
 * SentencePiece byte-pair encoding (`tokenizer.ggml.model` = llama: Llama 2, Mistral, TinyLlama) as tokenizer.json
 * parts, the way transformers converts it (convert_slow_tokenizer.py): spaces become U+2581, one stands before every
 * piece of text, merges follow from the tokens' scores, and what has no token is spelled in bytes.
 */
import type { GgufValue } from './gguf-header.ts';
import { corruptModel } from './model-errors.ts';
import type { Vocabulary } from './vocabulary.ts';
import { numberArray, TOKEN_TYPES } from './vocabulary.ts';

const SPACE = '\u2581';

export type SentencePiece = {
  readonly model: unknown;
  readonly normalizer: unknown;
  readonly decoder: unknown;
};

export function sentencePiece(
  metadata: ReadonlyMap<string, GgufValue>,
  vocabulary: Vocabulary,
): SentencePiece {
  const scores = numberArray(metadata, 'tokenizer.ggml.scores');
  if (scores === undefined || scores.length < vocabulary.tokens.length) {
    throw corruptModel('tokenizer.ggml.scores is shorter than its vocabulary');
  }
  const unknown = vocabulary.types.indexOf(TOKEN_TYPES.unknown);
  const prefix = metadata.get('tokenizer.ggml.add_space_prefix') !== false;
  return {
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: unknown === -1 ? null : vocabulary.tokens[unknown],
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(vocabulary.idOf),
      merges: mergesFromScores(vocabulary, scores),
    },
    normalizer: {
      type: 'Sequence',
      normalizers: [
        ...(prefix ? [{ type: 'Prepend', prepend: SPACE }] : []),
        { type: 'Replace', pattern: { String: ' ' }, content: SPACE },
      ],
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: SPACE }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(prefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
  };
}

/** Cutting a token of n characters everywhere looks at n² of them; a quarter of a million real tokens make 10^7. */
const CUT_CHARS_MAX = 3e8;

type Merge = { readonly left: string; readonly right: string; readonly score: number };

/**
 * Every way to put a token together from two others; the token with the higher score is made first. A token of n
 * characters has n − 1 cuts and names are short, so the list stays near the size of the vocabulary.
 */
function mergesFromScores(vocabulary: Vocabulary, scores: readonly number[]): (readonly [string, string])[] {
  const work = vocabulary.tokens.reduce((sum, token) => sum + token.length ** 2, 0);
  if (work > CUT_CHARS_MAX) throw corruptModel('its vocabulary is made of impossibly long tokens');
  const merges: Merge[] = [];
  vocabulary.tokens.forEach((token, id) => {
    if (vocabulary.types[id] !== TOKEN_TYPES.normal) return;
    for (let cut = 1; cut < token.length; cut++) {
      const [left, right] = [token.slice(0, cut), token.slice(cut)];
      if (vocabulary.idOf.has(left) && vocabulary.idOf.has(right))
        merges.push({ left, right, score: scores[id]! });
    }
  });
  merges.sort(
    (a, b) => b.score - a.score || b.left.length - a.left.length || b.right.length - a.right.length,
  );
  return merges.map(({ left, right }) => [left, right]);
}
