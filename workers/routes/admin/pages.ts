/** Lists on the wire: which page a request asks for, and the answer to it. */
import { type PageQuery, pageQuerySchema, writeCursor } from '../../../shared/admin-pages.ts';
import type { AppContext } from '../../context.ts';
import type { Page } from '../../db/pages.ts';
import { parse } from '../../middleware/body.ts';

/** @throws MaskrouteError `invalid_request` for a limit or a cursor that is none. */
export const pageQuery = (c: AppContext): PageQuery => parse(pageQuerySchema, c.req.query());

export const listed = <T>({ data, next }: Page<T>) => ({
  object: 'list' as const,
  data,
  has_more: next !== null,
  next: next === null ? null : writeCursor(next),
});
