/** What a caller thinks of a completion: once a caller and completion. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { feedbackSchema } from '../../shared/wire/openai.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { ageOf_ms } from '../counting/completion-ids.ts';
import { d1 } from '../db/d1.ts';
import { insertFeedback } from '../db/usage-rows.ts';
import { tenantOnly } from '../http/authentication.ts';
import { type AppEnv, holdOf } from '../http/context.ts';
import { methodNotAllowed } from '../http/error-answers.ts';
import { readJson } from '../http/request-body.ts';
import { EVENTS } from '../limits.ts';

export const feedback = new Hono<AppEnv>()
  .post('/feedback', tenantOnly, async (c) => {
    const { id, rating, comment } = parse(feedbackSchema, await readJson(c.req.raw));
    const { caller, services } = c.var;
    // Said of others' completions and of none alike: whose they are is nobody's business.
    const request = services.completionIds.eventOf(id, caller.tenant);
    if (request === null) {
      throw new MaskrouteError('not_found', 'There is no such completion.', { param: 'id' });
    }
    if (ageOf_ms(request, Date.now()) > EVENTS.counted_ms) {
      throw new MaskrouteError('not_found', 'The completion is too old to be rated.', { param: 'id' });
    }
    await services.bursts.feedback.enter(`feedback:${caller.tenant}`);
    const row = {
      tenantId: caller.tenant,
      apiKeyId: caller.keyId,
      // One name for one completion, whatever prefix its endpoint gave it.
      completionId: request,
      rating,
      comment: comment ?? null,
      createdAt_ms: Date.now(),
    };
    const { tenant, keyId: key_id } = caller;
    const event = {
      kind: 'rating',
      request,
      tenant,
      key_id,
      rating,
      created_at_ms: row.createdAt_ms,
    } as const;
    const kept = insertFeedback(services.db, row);
    // What is kept is counted, also when the client does not wait for that, or D1 takes longer than anybody waits.
    holdOf(c)(kept.then(() => services.events.send(event)).catch(() => {}));
    await d1(kept);
    return c.json({ object: 'maskroute.feedback', id, rating }, 201);
  })
  .all('/feedback', methodNotAllowed('POST'));
