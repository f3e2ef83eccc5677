/** `GET /v1/load`: how busy this backend is and which masks it works with, for whoever chooses between backends. */
import { Hono } from 'hono';
import { BACKEND_HEADERS, formatLoad, type Load, type LoadReport } from '../../shared/backends.ts';
import type { Engine } from '../serving/engine.ts';
import type { ApiEnv, ApiParts } from './context.ts';

const loadOf = (engine: Engine): Load => {
  const { requestsRunning, requestsWaiting, queueCapacity } = engine.stats();
  return { running: requestsRunning, waiting: requestsWaiting, capacity: queueCapacity };
};

/** The same in short, for a header of every answer: who sends requests need not ask. */
export const loadHeader = (engine: Engine): [name: string, value: string] => [
  BACKEND_HEADERS.load,
  formatLoad(loadOf(engine)),
];

export const loadRoutes = ({ model, lifecycle, recentMasks }: ApiParts): Hono<ApiEnv> =>
  new Hono<ApiEnv>().get('/v1/load', (c) =>
    c.json({
      object: 'maskroute.load',
      model: model.name,
      ...loadOf(model.engine),
      draining: lifecycle.draining || model.engine.failure !== undefined,
      hot_masks: recentMasks.list(),
    } satisfies LoadReport),
  );
