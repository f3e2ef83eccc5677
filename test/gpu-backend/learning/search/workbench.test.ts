/** Costs of masks over the parts of a text: the whole, a glance, and races that end early. */
import { expect, it } from 'vitest';
import type { SampleBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import { createBudget } from '../../../../gpu-backend/learning/search/budget.ts';
import type { Text } from '../../../../gpu-backend/learning/search/texts.ts';
import { createWorkbench } from '../../../../gpu-backend/learning/search/workbench.ts';
import type { Mask } from '../../../../shared/mask/mask.ts';

const any = { min: 0, max: 2 };
const budget = createBudget({
  layerCount: 2,
  targetSparsity: 0.25,
  weights: { attention: 1, ffn: 1 },
  attention: any,
  ffn: any,
});
/** Scored positions of each batch. */
const POSITIONS = [10, 30, 20];
/** Mean loss on each batch, by the mask's bits. */
const LOSSES: Record<string, number[]> = {
  '1111': [1, 2, 3],
  '0111': [2, 3, 4],
  // Worse at first sight.
  '1011': [2.1, 2, 3],
  // Better at first, level after the second batch.
  '1101': [1.7, 3.1, 3],
  // In front all the way.
  '1110': [1.5, 3.1, 3.8],
};
const maskOf = (bits: string): Mask => ({ runs: Uint8Array.from(bits, Number) });

function workbench(glanceParts = 2) {
  const evaluated: string[] = [];
  const known = new Map<string, readonly number[]>();
  const batches = POSITIONS.map((count) => ({ scoredRows: new Int32Array(count) }) as unknown as SampleBatch);
  const text: Text = { name: 'text', batches };
  const bench = createWorkbench({
    budget,
    seed: 1,
    signal: undefined,
    onResult: () => {},
    journal: {
      async result(name, compute) {
        const values = known.get(name) ?? (await compute());
        known.set(name, values);
        return values;
      },
    },
    texts: { text: () => text, draw: () => [] },
    async loss(batch, gates) {
      const bits = Array.from(gates).join('');
      evaluated.push(`${bits} ${batches.indexOf(batch)}`);
      return LOSSES[bits]![batches.indexOf(batch)]!;
    },
    step: () => Promise.reject(new Error('no step here')),
  });
  return { on: bench.costOn('text', [], 60, glanceParts), evaluated };
}

it('weights batches by their positions, and a glance takes the first ones', async () => {
  const { on } = workbench();
  expect(await on.ofMask(maskOf('1110'))).toBeCloseTo((10 * 0.5 + 30 * 1.1 + 20 * 0.8) / 60, 12);
  expect(await on.atAGlance(maskOf('1110'))).toBeCloseTo((10 * 0.5 + 30 * 1.1) / 40, 12);
});

it('a challenger is given up after the first part that it does not lead after', async () => {
  const { on, evaluated } = workbench();
  const rival = maskOf('0111');
  expect(await on.isBetter(maskOf('1011'), rival)).toBe(false);
  expect(evaluated).toEqual(['1011 0', '0111 0']);
  // It would win over the whole text; a lead that is lost on the way is not trusted.
  expect(await on.isBetter(maskOf('1101'), rival)).toBe(false);
  expect(evaluated.slice(2)).toEqual(['1101 0', '1101 1', '0111 1']);
});

it('a challenger that leads all the way wins, and was compared on the whole text', async () => {
  const { on, evaluated } = workbench();
  expect(await on.isBetter(maskOf('1110'), maskOf('0111'))).toBe(true);
  expect(evaluated).toEqual(['1110 0', '0111 0', '1110 1', '0111 1', '1110 2', '0111 2']);
});

it('a mask does not win against itself', async () => {
  const { on } = workbench();
  expect(await on.isBetter(maskOf('0111'), maskOf('0111'))).toBe(false);
});
