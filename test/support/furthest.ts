/**
 * By how much two lists of numbers differ where they differ most. Lists of different lengths are infinitely far apart.
 * With a NaN the result is NaN, so that `toBeLessThan` fails.
 */
export function furthest(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.POSITIVE_INFINITY;
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i]! - b[i]!));
  return most;
}

/** The same for lists of such lists. */
export const furthestInRows = (a: readonly ArrayLike<number>[], b: readonly ArrayLike<number>[]): number =>
  a.length === b.length ? Math.max(0, ...a.map((row, i) => furthest(row, b[i]!))) : Number.POSITIVE_INFINITY;
