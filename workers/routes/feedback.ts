/** What a caller thinks of a completion: once a caller and completion. */
import { Hono } from 'hono';
import { feedbackSchema } from '../../shared/admin.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import type { AppEnv } from '../context.ts';
import { insertFeedback } from '../db/feedback.ts';
import { tenantOnly } from '../middleware/authenticate.ts';
import { parse, readJson } from '../middleware/body.ts';
import { methodNotAllowed } from '../middleware/errors.ts';
import { d1 } from '../services/d1.ts';

export const feedback = new Hono<AppEnv>()
  .post('/feedback', tenantOnly, async (c) => {
    const { id, rating, comment } = parse(feedbackSchema, await readJson(c.req.raw));
    const { caller, services } = c.var;
    // Said of others' completions and of none alike: whose they are is nobody's business.
    if (services.completionIds.eventOf(id, caller.tenant) === null) {
      throw new MaskrouteError('not_found', 'There is no such completion.', { param: 'id' });
    }
    const row = {
      tenantId: caller.tenant,
      apiKeyId: caller.keyId,
      completionId: id,
      rating,
      comment: comment ?? null,
      createdAt_ms: Date.now(),
    };
    await d1(insertFeedback(services.db, row));
    return c.json({ object: 'maskroute.feedback', id, rating }, 201);
  })
  .all('/feedback', methodNotAllowed('POST'));
