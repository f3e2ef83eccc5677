/**
 * Hedging: a second backend is asked when the first has been silent for a while, and the first answer wins. It
 * costs work done twice, so it is off unless configured; a loser is called off at once.
 */
import type { Outcome } from './attempt.ts';

type Ask<T> = (signal: AbortSignal) => Promise<T>;

/** `after_ms` 0, or no `second`: plainly the first. A failure counts only when nobody else can still answer. */
export async function hedged<T extends Outcome>(
  first: Ask<T>,
  second: Ask<T> | undefined,
  after_ms: number,
  signal: AbortSignal,
): Promise<T> {
  if (second === undefined || after_ms === 0) return await first(signal);
  const callOff = [new AbortController(), new AbortController()] as const;
  const begin = (ask: Ask<T>, index: 0 | 1) => ask(AbortSignal.any([signal, callOff[index].signal]));
  const running = [begin(first, 0)];
  let timer: ReturnType<typeof setTimeout> | undefined;
  const silent = new Promise<'silent'>((resolve) => {
    timer = setTimeout(resolve, after_ms, 'silent');
  });
  const early = await Promise.race([running[0]!, silent]);
  clearTimeout(timer ?? null);
  if (early !== 'silent') return early;

  running.push(begin(second, 1));
  const winner = await Promise.race(
    running
      .map(async (attempt, index) => {
        const outcome = await attempt;
        return outcome.kind === 'answer' ? { outcome, index } : await new Promise<never>(() => {});
      })
      .concat(Promise.all(running).then((outcomes) => ({ outcome: outcomes[1]!, index: 1 }))),
  );
  callOff[winner.index === 0 ? 1 : 0].abort();
  return winner.outcome;
}
