/** Storing a mask set, however it came. */
import type { MaskSetSummary } from '../../shared/admin.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import type { Database } from '../db/client.ts';
import { insertMaskSet, type WrittenMaskSet } from '../db/mask-sets.ts';
import { MASK_SET_BYTES_MAX } from '../limits.ts';
import { d1 } from './d1.ts';

/** `created` is false for content that was there. @throws MaskrouteError `invalid_mask_set` for one that is too large. */
export async function storeMaskSet(
  db: Database,
  tenant: string,
  written: WrittenMaskSet,
): Promise<{ created: boolean; summary: MaskSetSummary }> {
  const bytes = written.content_bytes;
  if (bytes > MASK_SET_BYTES_MAX) {
    const advice = 'use fewer clusters or dimensions, or write centroids with fewer digits';
    throw new MaskrouteError(
      'invalid_mask_set',
      `The set takes ${bytes} bytes, more than the ${MASK_SET_BYTES_MAX} that the database holds: ${advice}.`,
    );
  }
  return await d1(insertMaskSet(db, tenant, written, Date.now()));
}
