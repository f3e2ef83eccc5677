/**
 * Milliseconds a decoded token on the serving engine, for masks by what they run. Two masks with equally many attention
 * and FFN blocks read equally many weights, so each such pair of counts is measured once, in rounds in which all take
 * their turn: whatever slows the machine for a while slows all of them.
 */
import type { Mask } from '../../shared/mask.ts';
import type { Runner } from '../engine/runner.ts';
import { interleaved, median } from '../measure.ts';

/** Tokens before the measured ones, and how many are measured a round. */
const PROMPT_TOKENS = 64;
const STEPS = 16;

export type Counts = { readonly attention: number; readonly ffn: number };

/** Blocks that a mask leaves out, by kind. */
export function skippedCounts({ runs }: Mask): Counts {
  const counts = { attention: 0, ffn: 0 };
  runs.forEach((bit, block) => {
    if (bit === 0) counts[block % 2 === 0 ? 'attention' : 'ffn']++;
  });
  return counts;
}

export type Timer = {
  /** Measures all of them, again where they were measured before. */
  measure(masks: readonly Mask[], rounds: number): Promise<void>;
  /** ms a token. @throws Error for a mask whose counts were not measured. */
  msOf(mask: Mask): number;
};

export function createTimer(runner: Runner, signal?: AbortSignal): Timer {
  const known = new Map<string, number>();
  return {
    async measure(masks, rounds) {
      const subjects = new Map<string, Mask>();
      for (const mask of masks) subjects.set(nameOf(mask), mask);
      const found = await interleaved(
        [...subjects].map(([name, mask]) => ({
          name,
          measure: () => {
            signal?.throwIfAborted();
            return decodeTime(runner, mask);
          },
        })),
        rounds,
      );
      for (const [name, ms] of found) known.set(name, ms);
    },
    msOf(mask) {
      const ms = known.get(nameOf(mask));
      if (ms === undefined) throw new Error(`no time was taken of ${nameOf(mask)}`);
      return ms;
    },
  };
}

function nameOf(mask: Mask): string {
  const { attention, ffn } = skippedCounts(mask);
  const replaced = attention + ffn > 0 ? (mask.surrogates ?? 'holes') : 'dense';
  return `${attention} attention, ${ffn} FFN, ${replaced}`;
}

/** The median step, greedy or not makes no difference to it. */
async function decodeTime(runner: Runner, mask: Mask): Promise<number> {
  const cache = runner.newCache();
  const plan = { mask, kv: 'preserve' } as const;
  const token = (i: number) => (100 + i * 7919) % runner.config.vocabularySize;
  const tokenIds = Array.from({ length: PROMPT_TOKENS }, (_, i) => token(i));
  await runner.run({ cache, tokenIds, plan, logitRows: [] });
  const times: number[] = [];
  for (let step = 0; step < STEPS; step++) {
    const start = performance.now();
    await runner.run({ cache, tokenIds: [token(step)], plan, logitRows: [0] });
    times.push(performance.now() - start);
  }
  return median(times);
}
