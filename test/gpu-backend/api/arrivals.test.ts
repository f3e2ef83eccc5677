import { expect, test } from 'vitest';
import { Arrivals, PER_TURN } from '../../../gpu-backend/api/arrivals.ts';

test('requests that come at once are taken up a few at a time, in their order', async () => {
  const arrivals = new Arrivals();
  const count = 10 * PER_TURN + 3;
  const taken: number[] = [];
  let turn = 0;
  const turnsOf: number[] = [];
  const countTurns = () => {
    turn++;
    if (taken.length < count) setImmediate(countTurns);
  };
  setImmediate(countTurns);
  await Promise.all(
    Array.from({ length: count }, async (_, i) => {
      await arrivals.turn();
      taken.push(i);
      turnsOf.push(turn);
    }),
  );
  expect(taken).toEqual(Array.from({ length: count }, (_, i) => i));
  for (let each = 0; each <= turn; each++)
    expect(turnsOf.filter((one) => one === each).length).toBeLessThanOrEqual(PER_TURN);
});

test('a request that comes alone does not wait, and later ones do not come before those that wait', async () => {
  const arrivals = new Arrivals();
  let hasTurned = false;
  setImmediate(() => {
    hasTurned = true;
  });
  await arrivals.turn();
  expect(hasTurned).toBe(false);
  const taken: string[] = [];
  const take = async (name: string) => {
    await arrivals.turn();
    taken.push(name);
  };
  const first = Array.from({ length: 2 * PER_TURN }, () => take('first'));
  await new Promise((resolve) => setImmediate(resolve));
  const late = take('late');
  await Promise.all([...first, late]);
  expect(taken.at(-1)).toBe('late');
});
