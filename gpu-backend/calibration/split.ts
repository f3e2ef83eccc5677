/** Held-out rows by content: equal prompts never stand on both sides, and the split survives any reordering. */
import { createHash } from 'node:crypto';
import type { CalibrationRow } from './read-data.ts';

export type Split = { readonly fit: CalibrationRow[]; readonly heldOut: CalibrationRow[] };

/** About `share` of the prompts go to `heldOut`. */
export function splitRows(rows: readonly CalibrationRow[], share: number): Split {
  const fit: CalibrationRow[] = [];
  const heldOut: CalibrationRow[] = [];
  for (const row of rows) {
    const digest = createHash('sha256').update(`held-out\n${row.routeText}`).digest();
    (digest.readUInt32LE() / 2 ** 32 < share ? heldOut : fit).push(row);
  }
  return { fit, heldOut };
}
