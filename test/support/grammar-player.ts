/** Answers out of a grammar with no model: tokens that may follow are drawn at random, on the real tokenizer. */
import { SequenceGrammar } from '../../gpu-backend/engine/grammar.ts';
import { createGrammars, type GrammarLimits, type Grammars } from '../../gpu-backend/grammar/grammars.ts';
import type { GrammarSpec } from '../../gpu-backend/grammar/xgrammar.ts';
import { type ModelText, openModelText } from '../../gpu-backend/model/tokenizer/model-text.ts';
import { seededRandom } from '../../gpu-backend/random.ts';
import { installedModel } from './installed-model.ts';

type Played = { readonly text: string; readonly ended: boolean; readonly tokens: number };

export type GrammarPlayer = AsyncDisposable & {
  readonly grammars: Grammars;
  readonly text: ModelText;
  readonly errors: readonly string[];
  readonly endTokenId: number;
  readonly vocabularySize: number;
  play(spec: GrammarSpec, seed: number, tokensMax?: number): Promise<Played>;
};

/** Opened once, for all players of a process. `closing`: ids that end what is open, so that a text ends at all. */
let opened: Promise<{ readonly text: ModelText; readonly closing: readonly number[] }> | undefined;
async function openText() {
  const { folder, manifest } = await installedModel();
  const text = await openModelText(folder, manifest);
  const decoder = new TextDecoder();
  const all = Array.from({ length: manifest.config.vocabularySize }, (_, id) => id);
  const closing = all.filter((id) => /^["}\]]+$/.test(decoder.decode(text.tokenizer.tokenBytes(id))));
  return { text, closing };
}

export async function openGrammarPlayer(limits: Partial<GrammarLimits> = {}): Promise<GrammarPlayer> {
  opened ??= openText();
  const { text, closing } = await opened;
  const { manifest } = await installedModel();
  const errors: string[] = [];
  const endTokenId = manifest.eosTokenIds[0]!;
  const vocabularySize = manifest.config.vocabularySize;
  const vocabulary = { table: text.tokenizer.table, size: vocabularySize, endTokenId };
  const grammars = createGrammars({ vocabulary, onError: (detail) => errors.push(detail), limits });
  const call = { tenant: 'a', signal: new AbortController().signal, param: 'schema' };
  return {
    grammars,
    text,
    errors,
    endTokenId,
    vocabularySize,
    async play(spec, seed, tokensMax = 400) {
      const random = seededRandom(seed);
      const open = await grammars.open(await grammars.prepare(spec, call), call);
      try {
        const grammar = new SequenceGrammar(open.session);
        const ids: number[] = [];
        while (ids.length < tokensMax) {
          const logits = new Float32Array(vocabularySize);
          grammar.restrict(logits, [endTokenId]);
          const allowed: number[] = [];
          for (let id = 0; id < vocabularySize; id++) if (logits[id] === 0) allowed.push(id);
          const last = closing.filter((id) => logits[id] === 0);
          const ends = logits[endTokenId] === 0 && random() < 0.7;
          const among = last.length > 0 && random() < 0.5 ? last : allowed;
          const id = ends ? endTokenId : among[Math.floor(random() * among.length)]!;
          if (id === endTokenId) return { text: text.tokenizer.decode(ids), ended: true, tokens: ids.length };
          ids.push(id);
          grammar.accept(id);
        }
        return { text: text.tokenizer.decode(ids), ended: false, tokens: ids.length };
      } finally {
        open.close();
      }
    },
    [Symbol.asyncDispose]: () => grammars.close(),
  };
}
