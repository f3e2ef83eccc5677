/**
 * Pages of the admin API's lists. Keys, tenants, mask sets, publications and experiments are listed newest first:
 * `?limit=` says how many an answer has, and `?before=` takes the `next` of the answer before. Usage is listed in the
 * order of what it is grouped by, and takes its `next` as `?after=`. Without them an answer is the first page.
 */
import { z } from 'zod';
import { LIST_COUNT_MAX } from './admin.ts';

/** Where a page ended: what its last item is sorted by, and what tells it from others that are sorted alike. */
export type Cursor = { readonly at: number; readonly id: string };

const CURSOR = /^(\d{1,15})~([A-Za-z0-9._-]{1,200})$/;
export const writeCursor = ({ at, id }: Cursor): string => `${at}~${id}`;

export const pageQuerySchema = z.object({
  limit: z.coerce.number().pipe(z.int().min(1).max(LIST_COUNT_MAX)).default(LIST_COUNT_MAX),
  before: z
    .string()
    .regex(CURSOR, 'expected the next of an earlier answer')
    .transform((text): Cursor => {
      const [, at, id] = CURSOR.exec(text)!;
      return { at: Number(at), id: id! };
    })
    .optional(),
});
export type PageQuery = z.infer<typeof pageQuerySchema>;

export const keysQuerySchema = pageQuerySchema.extend({
  /** `working`: neither revoked nor expired. Absent: all. */
  state: z.enum(['working']).optional(),
});
