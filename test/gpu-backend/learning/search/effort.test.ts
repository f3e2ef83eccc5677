/** How much a learning run does, by how much text there is. */
import { expect, test } from 'vitest';
import {
  effortFor,
  fullText,
  LEARN_EFFORT,
  QUICK_EFFORT,
  searchResults,
} from '../../../../gpu-backend/learning/search/effort.ts';

const BLOCKS = 60;
/** What 60 short prompts come to, a tenth held out and a quarter of the rest chosen on. */
const SIXTY_ROWS = 2400;

test('an effort is what was asked for where there is text for it', () => {
  expect(effortFor(LEARN_EFFORT, fullText(LEARN_EFFORT))).toEqual(LEARN_EFFORT);
  expect(effortFor(QUICK_EFFORT, 1e6)).toEqual(QUICK_EFFORT);
});

test('on little text fewer masks are tried, for fewer groups, and never none', () => {
  const little = effortFor(LEARN_EFFORT, SIXTY_ROWS);
  const [few, all] = [searchResults(little, BLOCKS), searchResults(LEARN_EFFORT, BLOCKS)];
  expect(few.one * little.one.glanceParts).toBeLessThan(0.4 * all.one * LEARN_EFFORT.one.glanceParts);
  expect(little.masksMax).toBe(2);
  const least = effortFor(LEARN_EFFORT, 10);
  for (const { exchanges, triesMax, gateSteps, glanceParts } of [least.one, least.group])
    expect(Math.min(exchanges, triesMax, gateSteps, glanceParts)).toBeGreaterThan(0);
  expect(least.masksMax).toBe(2);
});

test('more text never means less work', () => {
  const results = [100, 1000, 3000, 6000, 9000, 20_000].map((positions) => {
    const effort = effortFor(LEARN_EFFORT, positions);
    const { one, group } = searchResults(effort, BLOCKS);
    return one + effort.masksMax * group;
  });
  expect(results).toEqual(results.toSorted((a, b) => a - b));
});

test('a quick set takes less work than the usual one, on little text and on much', () => {
  for (const positions of [SIXTY_ROWS, 1e6]) {
    const work = [QUICK_EFFORT, LEARN_EFFORT].map((wanted) => {
      const effort = effortFor(wanted, positions);
      const { one, group } = searchResults(effort, BLOCKS);
      return one * effort.one.glanceParts + effort.masksMax * group;
    });
    expect(work[0]! / work[1]!).toBeLessThan(0.65);
  }
});
