/** `GET /v1/answers/{id}`: what a recent answer cost, asked by an edge that did not hear the end of it. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/errors.ts';
import type { ApiEnv, ApiParts } from './context.ts';

export const answerRoutes = ({ recent }: Pick<ApiParts, 'recent'>): Hono<ApiEnv> =>
  new Hono<ApiEnv>().get('/v1/answers/:id', (c) => {
    const usage = recent.find(c.req.param('id'));
    if (usage === undefined) throw new MaskrouteError('not_found', 'There is no such answer.');
    const counts = usage ?? { prompt_tokens: 0, completion_tokens: 0 };
    return c.json({ object: 'maskroute.answer', finished: usage !== null, ...counts });
  });
