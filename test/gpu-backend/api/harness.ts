/** The real server on a free port, over any engine. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Tracer } from '@opentelemetry/api';
import OpenAI from 'openai';
import { pino } from 'pino';
import {
  type ApiLimits,
  type ApiOptions,
  DEFAULT_LIMITS,
  type ServedModel,
} from '../../../gpu-backend/api/parts.ts';
import { type RunningServer, startServer } from '../../../gpu-backend/api/server.ts';
import { createEncoderService } from '../../../gpu-backend/encoder/encoder-service.ts';
import { createMaskRegistry } from '../../../gpu-backend/engine/mask-registry.ts';
import type { HomeJobs } from '../../../gpu-backend/jobs/home-jobs.ts';

import { testHome } from '../../support/installed-model.ts';

export const BACKEND_KEY = 'test-backend-key-0123456789';

export const METRICS_KEY = 'test-metrics-key-0123456789';

export const AUDIENCE = 'https://backend.test';

export type TestServer = RunningServer & {
  readonly client: OpenAI;
  /** Every log line so far. */
  readonly logs: () => string;
  post(path: string, body: unknown, init?: RequestInit): Promise<Response>;
  [Symbol.asyncDispose](): Promise<void>;
};

type ServeOptions = {
  readonly jobs?: HomeJobs['held'];
  readonly tracer?: Tracer;
  readonly audience?: string | undefined;
  readonly metricsKey?: string;
  /** Where masks are asked for. */
  readonly edgeUrl?: string;
};

export async function serveModel(
  model: ServedModel,
  limits: Partial<ApiLimits> = {},
  options: ServeOptions = {},
): Promise<TestServer> {
  const api = await apiOptions(model, limits, options);
  const server = await startServer(api.options, { port: 0, hostname: '127.0.0.1' });
  return {
    ...server,
    client: new OpenAI({ baseURL: `${server.url}/v1`, apiKey: BACKEND_KEY, maxRetries: 0 }),
    logs: api.logs,
    post: (path, body, init) =>
      fetch(server.url + path, {
        method: 'POST',
        headers: { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': 'application/json' },
        body: typeof body === 'string' ? body : JSON.stringify(body),
        ...init,
      }),
    async [Symbol.asyncDispose]() {
      await server.close();
      await api.close();
    },
  };
}

/** What an API over a model is opened with, folders of its own among it. */
export async function apiOptions(
  model: ServedModel,
  limits: Partial<ApiLimits> = {},
  { jobs, ...more }: ServeOptions = {},
): Promise<{ readonly options: ApiOptions; readonly logs: () => string; close(): Promise<void> }> {
  const { audience } = { audience: AUDIENCE, ...more };
  const home = await mkdtemp(join(tmpdir(), 'maskroute-api-'));
  let logs = '';
  const log = pino(
    {},
    {
      write: (line: string) => {
        logs += line;
      },
    },
  );
  const encoders = createEncoderService({
    home: testHome,
    onError: (detail) => log.error(detail),
  });
  const options: ApiOptions = {
    model,
    masks: createMaskRegistry({
      folder: join(home, 'masks'),
      model: model.engine.model,
      backendKey: BACKEND_KEY,
      edgeUrl: more.edgeUrl,
      warn: (message, detail) => log.warn(detail, message),
    }),
    encoders,
    jobs: () => jobs,
    tracer: more.tracer,
    keys: { backendKey: BACKEND_KEY, metricsKey: more.metricsKey, audience },
    limits: { ...DEFAULT_LIMITS, drain_ms: 1000, costs_ms: 0, flush_ms: 200, ...limits },
    log,
  };
  return {
    options,
    logs: () => logs,
    async close() {
      await encoders.close();
      await rm(home, { recursive: true, force: true });
    },
  };
}

/** The JSON of a response. @throws Error with its text when it has another status. */
export async function answer<T>(response: Promise<Response>, status: number): Promise<T> {
  const got = await response;
  const text = await got.text();
  if (got.status !== status) throw new Error(`status ${got.status} in place of ${status}: ${text}`);
  return JSON.parse(text);
}

/** Waits until `condition` holds. @throws Error after `limit_ms`. */
export async function eventually(
  condition: () => boolean | Promise<boolean>,
  limit_ms = 20_000,
): Promise<void> {
  const until = Date.now() + limit_ms;
  // Asking may take as long as what is waited for gets of the processor: what takes long is asked for less often.
  for (let pause_ms = 5; !(await condition()); pause_ms = Math.min(40, 1.2 * pause_ms)) {
    if (Date.now() > until) throw new Error(`it did not happen within ${limit_ms} ms`);
    await new Promise((resolve) => setTimeout(resolve, pause_ms));
  }
}

type SseEvent = { readonly event: string | undefined; readonly data: string };

/** Splits a stream's text into events, strictly: every block is one comment or one event. */
export function parseSse(text: string): { events: SseEvent[]; comments: string[] } {
  if (!text.endsWith('\n\n')) throw new Error('the stream does not end with an empty line');
  const events: SseEvent[] = [];
  const comments: string[] = [];
  for (const block of text.slice(0, -2).split('\n\n')) {
    if (block.startsWith(':')) {
      comments.push(block);
      continue;
    }
    const match = /^(?:event: (\w+)\n)?data: (.*)$/.exec(block);
    if (match === null) throw new Error(`not an event: ${JSON.stringify(block)}`);
    events.push({ event: match[1], data: match[2]! });
  }
  return { events, comments };
}

export async function collect<Item>(stream: AsyncIterable<Item>): Promise<Item[]> {
  const items: Item[] = [];
  for await (const item of stream) items.push(item);
  return items;
}
