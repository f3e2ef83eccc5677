/**
 * The log of what administrators changed: `GET /admin/v1/audit?tenant=&q=` lists it, the newest first,
 * `GET /admin/v1/audit/{id}` shows one entry, and `GET /admin/v1/audit/export?tenant=` is all of it as rows of JSON. A
 * tenant's own administrator sees what was changed of that tenant. It is kept for `AUDIT_KEPT_DAYS` of the edge's configuration.
 */
import { z } from 'zod';
import { timestamp } from './admin-wire.ts';

export const auditEntrySchema = z.object({
  id: z.int(),
  created_at: timestamp,
  /** The tenant that it was about; empty for the whole edge. */
  tenant: z.string(),
  /** The id of the key, `root`, or who signed in. */
  actor: z.string(),
  /** Null where nobody before the edge can be believed, as on one machine. */
  address: z.string().nullable(),
  /** Method and route: `PATCH /tenants/:id`. */
  action: z.string(),
  /** What it was about: `/tenants/acme`. */
  target: z.string(),
  /** Null where there was nothing, or it is not known what. Keys are not in it, only what their lists show. */
  before: z.unknown().nullable(),
  /** Null where nothing is left, and where the edge never heard what became of it: see `is_known`. */
  after: z.unknown().nullable(),
  /** False: the edge ended, or failed, before it could write down what became of it. */
  is_known: z.boolean(),
  request_id: z.string(),
});
export type AuditEntry = z.infer<typeof auditEntrySchema>;
