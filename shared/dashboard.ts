/**
 * What the dashboard's page and the edge say to each other beside the admin API: the session.
 *
 * | method and path | body | answer |
 * |---|---|---|
 * | `POST /dashboard/session`   | {@link loginSchema} | {@link sessionSchema}, and the session's cookie |
 * | `GET /dashboard/session`    |                     | {@link sessionSchema}; 204 when nobody is logged in, 401 when a session has ended |
 * | `DELETE /dashboard/session` |                     | 204; the cookie is gone and the session has ended, copies of it within 5 s everywhere |
 * | `DELETE /dashboard/session?everywhere=true` |     | the same of all sessions that the key has opened |
 *
 * With the cookie, the admin API takes requests without a key. Those that change something, logging out
 * included, must come from the page's own origin and carry the session's token in {@link CSRF_HEADER}.
 */
import { z } from 'zod';

export const CSRF_HEADER = 'x-maskroute-csrf';

export const loginSchema = z.strictObject({ key: z.string().min(1).max(512) });

export const sessionSchema = z.object({
  /** The id of the key that logged in, or `root`. */
  actor: z.string(),
  /** The only tenant that the session sees; null for one that manages all. */
  tenant: z.string().nullable(),
  csrf: z.string(),
  expires_at: z.iso.datetime(),
});
export type Session = z.infer<typeof sessionSchema>;
