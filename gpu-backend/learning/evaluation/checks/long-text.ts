/**
 * Whether a masked model still writes good text when the cache holds mostly its own tokens. It generates well past 512
 * tokens, and the dense model scores them window by window. If masked attention degrades the cache, perplexity rises
 * from window to window, or the text repeats itself.
 */
import { denseMask, type Mask } from '../../../../shared/mask/mask.ts';
import { PLAIN_SAMPLING, type Sampling } from '../../../engine/engine.ts';
import type { Runner } from '../../../engine/runner-interface.ts';
import { sample } from '../../../engine/sampler.ts';
import { seededRandom } from '../../../random.ts';
import type { ScoreSession } from '../../search/score-masks.ts';

/** Ends of the windows, in generated tokens. */
const WINDOWS = [256, 512, 640] as const;
const CHUNK_TOKENS = 128;
const SAMPLING: Sampling = { ...PLAIN_SAMPLING, temperature: 0.8 };

type WindowFigures = {
  /** The window's tokens `from` to `to` (exclusive), counted from the prompt's end. */
  readonly from: number;
  readonly to: number;
  /** Under the dense model, given everything before. */
  readonly perplexity: number;
  /** Share of 4-grams that did not occur in the text before. */
  readonly newFourGrams: number;
};

/** A prompt and the mask that its cluster is decoded with. */
type RoutedPrompt = { readonly tokenIds: Int32Array; readonly mask: Mask };

type Parts = {
  readonly runner: Runner;
  readonly session: ScoreSession;
  readonly signal?: AbortSignal | undefined;
};

/** Figures over all prompts. `endIds` are never drawn, so that every text is long. */
export async function judgeLongText(
  parts: Parts,
  prompts: readonly RoutedPrompt[],
  endIds: readonly number[],
  tokens: number,
): Promise<WindowFigures[]> {
  const ends = WINDOWS.map((end) => Math.min(end, tokens)).filter(
    (end, i, all) => i === 0 || end > all[i - 1]!,
  );
  const sums = ends.map(() => ({ loss: 0, fresh: 0, count: 0 }));
  for (const [index, prompt] of prompts.entries()) {
    const start = prompt.tokenIds.length;
    const text = await generate(parts, prompt, endIds, tokens, index + 1);
    const losses = await denseLosses(parts, text, start);
    const fresh = newFourGrams(text);
    losses.forEach((loss, position) => {
      const window = sums[ends.findIndex((end) => position < end)]!;
      window.loss += loss;
      window.fresh += fresh[start + position]!;
      window.count++;
    });
  }
  return sums.map(({ loss, fresh, count }, i) => ({
    from: i === 0 ? 0 : ends[i - 1]!,
    to: ends[i]!,
    perplexity: Math.exp(loss / count),
    newFourGrams: fresh / count,
  }));
}

/** Prompt and generated tokens. */
async function generate(
  { runner, signal }: Parts,
  { tokenIds: prompt, mask }: RoutedPrompt,
  endIds: readonly number[],
  tokens: number,
  seed: number,
): Promise<Int32Array> {
  const plan = { mask, kv: 'preserve' } as const;
  const cache = runner.newCache();
  const random = seededRandom(seed);
  const text = new Int32Array(prompt.length + tokens);
  text.set(prompt);
  let next = prompt;
  for (let at = prompt.length; at < text.length; at++) {
    signal?.throwIfAborted();
    const logits = await runner.run({ cache, tokenIds: next, plan, logitRows: [next.length - 1] });
    const state = {
      generated: new Map<number, number>(),
      prompt: new Set<number>(),
      forbidden: endIds,
      random,
    };
    text[at] = sample(logits, SAMPLING, state);
    next = text.subarray(at, at + 1);
  }
  return text;
}

/** −log p of every generated token under the dense model. */
async function denseLosses({ runner, session }: Parts, text: Int32Array, start: number): Promise<number[]> {
  const plan = { mask: denseMask(2 * runner.config.layerCount), kv: 'preserve' } as const;
  const cache = runner.newCache();
  const losses: number[] = [];
  for (let at = 0; at + 1 < text.length; at += CHUNK_TOKENS) {
    const tokenIds = text.subarray(at, Math.min(at + CHUNK_TOKENS, text.length - 1));
    const logitRows = Array.from(tokenIds, (_, i) => i).filter((i) => at + i + 1 >= start);
    const logits = await runner.run({ cache, tokenIds, plan, logitRows });
    if (logitRows.length === 0) continue;
    const found = await session.losses(
      logits,
      logitRows.map((i) => text[at + i + 1]!),
    );
    losses.push(...found.losses);
  }
  return losses;
}

/** 1 where the 4-gram that ends at a position is new, else 0. */
function newFourGrams(text: Int32Array): number[] {
  const seen = new Set<string>();
  return Array.from(text, (_, end) => {
    const gram = text.subarray(Math.max(0, end - 3), end + 1).join(' ');
    const fresh = seen.has(gram) ? 0 : 1;
    seen.add(gram);
    return fresh;
  });
}
