/**
 * Milliseconds that a decoded token takes less for each attention and each FFN block that is left out, on the engine
 * that serves: half of a kind out against none, in interleaved rounds.
 */
import type { Mask, SurrogatesId } from '../../shared/mask.ts';
import { denseMask, withSurrogates } from '../../shared/mask.ts';
import type { Runner } from '../engine/runner.ts';
import { interleaved, median } from '../measure.ts';
import type { BlockCounts } from '../training/budget.ts';

/** Tokens before those that are timed. */
const POSITION = 64;
const STEPS = 12;
const ROUNDS = 9;
/** A kind that costs next to nothing still has to weigh something. */
const BLOCK_MIN_ms = 1e-4;

export async function measureBlockTimes(
  runner: Runner,
  surrogates: SurrogatesId | undefined,
): Promise<BlockCounts> {
  const { layerCount } = runner.config;
  const without = (kind: 0 | 1): Mask => {
    const { runs } = denseMask(2 * layerCount);
    for (let layer = 0; layer < layerCount; layer += 2) runs[2 * layer + kind] = 0;
    return withSurrogates({ runs }, surrogates);
  };
  const masks = { dense: denseMask(2 * layerCount), attention: without(0), ffn: without(1) };
  const subjects = Object.entries(masks).map(([name, mask]) => ({
    name,
    measure: () => decode_ms(runner, mask),
  }));
  const found = await interleaved(subjects, ROUNDS);
  const out = (mask: Mask) => mask.runs.filter((bit) => bit === 0).length;
  const perBlock = (name: 'attention' | 'ffn') =>
    Math.max(BLOCK_MIN_ms, (found.get('dense')! - found.get(name)!) / out(masks[name]));
  return { attention: perBlock('attention'), ffn: perBlock('ffn') };
}

async function decode_ms(runner: Runner, mask: Mask): Promise<number> {
  const plan = { mask, kv: 'preserve' } as const;
  const cache = runner.newCache();
  const vocabulary = runner.config.vocabularySize;
  const token = (i: number) => (7919 * i) % vocabulary;
  await runner.run({
    cache,
    tokenIds: Array.from({ length: POSITION }, (_, i) => token(i)),
    plan,
    logitRows: [],
  });
  const times: number[] = [];
  for (let step = 0; step < STEPS; step++) {
    const start = performance.now();
    await runner.run({ cache, tokenIds: [token(step)], plan, logitRows: [0] });
    times.push(performance.now() - start);
  }
  return median(times);
}
