/** What routes are given: the parts that `main.ts` wires together, and what middleware learned of a request. */
import type { HttpBindings } from '@hono/node-server';
import type { Context } from 'hono';
import type { Logger } from 'pino';
import type { EncoderService } from '../encoder/encoder-service.ts';
import type { MaskRegistry } from '../engine/mask-registry.ts';
import type { Jobs } from '../jobs/job-queue.ts';
import type { RecentAnswers } from './answer-record.ts';
import type { Authenticate, Caller } from './auth.ts';
import type { Bodies } from './body.ts';
import type { Metrics } from './metrics.ts';
import type { ApiLimits, ServedModel } from './served-model.ts';
import type { Lifecycle } from './server.ts';
import type { RecentMasks } from './what-is-served.ts';

export type ApiParts = {
  readonly model: ServedModel;
  readonly masks: MaskRegistry;
  readonly authenticate: Authenticate;
  /** @throws MaskrouteError `invalid_api_key`. */
  readonly expectScraper: (authorization: string | undefined) => void;
  readonly metrics: Metrics;
  readonly recent: RecentAnswers;
  readonly lifecycle: Lifecycle;
  readonly bodies: Bodies;
  readonly limits: ApiLimits;
  readonly encoders: EncoderService;
  /** Undefined: this backend runs none. */
  readonly jobs: Jobs | undefined;
  readonly recentMasks: RecentMasks;
  readonly log: Logger;
};

export type ApiEnv = {
  /** Empty when the app is called without a server. */
  readonly Bindings: Partial<HttpBindings>;
  Variables: { requestId: string; caller: Caller };
};

export type ApiContext = Context<ApiEnv>;

/** They stay when the request fails later. */
export function setHeaders(c: ApiContext, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
}
