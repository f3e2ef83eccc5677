/** `GET /v1/answers/{id}`: what a recent answer cost, asked by an edge that did not hear the end of it. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/errors.ts';
import type { ApiEnv, ApiParts } from './context.ts';

export const answerRoutes = ({ recent }: Pick<ApiParts, 'recent'>): Hono<ApiEnv> =>
  new Hono<ApiEnv>().get('/v1/answers/:id', (c) => {
    const usage = recent.find(c.req.param('id'));
    if (usage === undefined) throw new MaskrouteError('not_found', 'There is no such answer.');
    if (usage === null) {
      throw new MaskrouteError('not_ready', 'The answer is not finished.', { retryAfter_s: 1 });
    }
    return c.json({ object: 'maskroute.answer', ...usage });
  });
