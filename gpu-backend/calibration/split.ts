/** Held-out rows by content: equal prompts never stand on both sides, and the split survives any reordering. */
import { createHash } from 'node:crypto';
import type { CalibrationRow } from './read-data.ts';

/**
 * The share of all prompts that nothing is learned from: no mask, and no surrogate either. One number for all, since equal
 * shares hold out equal prompts: what one part learned on would otherwise be another's held-out text.
 */
export const HELD_OUT_SHARE = 0.1;

export type Split = { readonly fit: CalibrationRow[]; readonly heldOut: CalibrationRow[] };

/** About `share` of the prompts go to `heldOut`; another `purpose` divides them independently. */
export function splitRows(rows: readonly CalibrationRow[], share: number, purpose = 'held-out'): Split {
  const fit: CalibrationRow[] = [];
  const heldOut: CalibrationRow[] = [];
  for (const row of rows) (isHeldOut(row, share, purpose) ? heldOut : fit).push(row);
  return { fit, heldOut };
}

/** What a smaller `share` holds out, a larger one does, too. */
export function isHeldOut({ routeText }: CalibrationRow, share: number, purpose = 'held-out'): boolean {
  const digest = createHash('sha256').update(`${purpose}\n${routeText}`).digest();
  return digest.readUInt32LE() / 2 ** 32 < share;
}

/** Each row once: what stands twice in the data must not count twice. */
export function distinctRows(rows: readonly CalibrationRow[]): CalibrationRow[] {
  const seen = new Set<string>();
  return rows.filter(({ content }) => {
    const digest = createHash('sha256').update(JSON.stringify(content)).digest('base64');
    if (seen.has(digest)) return false;
    seen.add(digest);
    return true;
  });
}
