/** What an edge says of itself: a page, its API on another, and the same as OpenAPI, which holds against the real app. */
import { describe, expect, it } from 'vitest';
import { z } from 'zod';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import { ANSWERS, type AnswerName } from '../../../shared/openapi/answers.ts';
import type { OpenApi } from '../../../shared/openapi/document.ts';
import { GROUPS } from '../../../shared/openapi/endpoints.ts';
import { app } from '../../../workers/app.ts';
import { ADMIN_KEY } from '../../support/edge/constants.ts';
import { CHAT, call, chat, freshIsolate, goLive, newTenant } from '../support/edge.ts';

const document = async (): Promise<OpenApi> => (await call('GET', '/openapi.json')).json();

describe('the document', () => {
  it('has every route of the app, and the app every endpoint of the document', async () => {
    const pages = ['/', '/docs', '/openapi.json', '/dashboard/assets/*', '/dashboard/*'];
    const routes = app.routes
      // Without middleware, and without the other paths that Azure's clients have for the same.
      .filter(({ method, path }) => method !== 'ALL' && !pages.includes(path) && !path.startsWith('/openai/'))
      .map(({ method, path }) => `${method} ${path.replaceAll(/:(\w+)(\{[^}]*\})?/g, '{$1}')}`);
    const documented = Object.entries((await document()).paths).flatMap(([path, methods]) =>
      Object.keys(methods).map((method) => `${method.toUpperCase()} ${path}`),
    );
    expect([...documented].sort()).toEqual([...new Set(routes)].sort());
  });

  const lists = GROUPS.flatMap(({ caller, endpoints }) =>
    endpoints
      .filter(({ method, path }) => method === 'GET' && caller === 'admin' && !path.includes('{'))
      .map(({ path, answers }) => [path, answers[200]!] as const)
      .filter(([, answer]) => typeof answer !== 'string' || answer in ANSWERS),
  );
  it.each(lists)('tells the truth of GET %s', async (path, answer) => {
    const { tenant } = await newTenant();
    const { version } = await goLive('documented', tenant);
    const query = /(traffic|drift)$/.test(path)
      ? `?tenant=${tenant}&version=${version}`
      : `?tenant=${tenant}`;
    const takesTenant = !/\/(tenants|backends|models)$/.test(path);
    const response = await call('GET', path + (takesTenant ? query : ''), { key: ADMIN_KEY });
    const body = await response.json();
    expect(response.status, JSON.stringify(body)).toBe(200);
    const schema: z.ZodType =
      typeof answer === 'string' ? ANSWERS[answer as AnswerName] : listSchema(ANSWERS[answer[0]!]);
    expect(z.safeParse(schema, body).error?.message).toBeUndefined();
  });

  it('tells the truth of completions', async () => {
    const { key } = await newTenant();
    const body = await (await chat(key)).json();
    expect(z.safeParse(ANSWERS.ChatCompletion, body).error?.message).toBeUndefined();
    const asked = { model: CHAT.model, input: 'north is cold' };
    const response = await (await call('POST', '/v1/responses', { key, body: asked })).json();
    expect(z.safeParse(ANSWERS.Response, response).error?.message).toBeUndefined();
    const models = await (await call('GET', '/v1/models', { key })).json();
    expect(z.safeParse(ANSWERS.ModelList, models).error?.message).toBeUndefined();
  });
});

describe('the pages', () => {
  it.each(['/', '/docs'])('%s loads one style sheet of this edge, and nothing else', async (path) => {
    const response = await call('GET', path, { headers: { accept: 'text/html,*/*;q=0.8' } });
    expect(response.status).toBe(200);
    expect(response.headers.get('content-type')).toMatch(/^text\/html/);
    expect(response.headers.get('content-security-policy')).toContain("default-src 'none'");
    expect(response.headers.get('x-request-id')).toMatch(/^req_/);
    const page = await response.text();
    const loaded = [...page.matchAll(/<(?:link|script|img|iframe)[^>]*? (?:href|src)="([^"]*)"/g)].map(
      ([, to]) => to,
    );
    expect(loaded).toEqual(['data:,', expect.stringMatching(/^\/dashboard\/assets\/site-[A-Z0-9]{8}\.css$/)]);
    expect(page).not.toMatch(/<script|<style|style=|onclick=/);
    const style = await call('GET', loaded[1]!);
    expect([style.status, style.headers.get('content-type')]).toEqual([
      200,
      expect.stringMatching(/^text\/css/),
    ]);
    expect(await style.text()).not.toMatch(/@import|url\(["']?(?!["']?data:)/);
  });

  it('/docs has every operation, under its name', async () => {
    const page = await (await call('GET', '/docs')).text();
    for (const methods of Object.values((await document()).paths)) {
      for (const { operationId } of Object.values(methods)) expect(page).toContain(`id="${operationId}"`);
    }
    // A reference leads to a place on the page.
    for (const [, name] of page.matchAll(/href="#([^"]+)"/g)) expect(page).toContain(`id="${name}"`);
  });

  it('/ is JSON for a program that asks for it', async () => {
    const response = await call('GET', '/', { headers: { accept: 'application/json' } });
    expect(await response.json()).toMatchObject({ object: 'maskroute.edge', openapi: '/openapi.json' });
  });

  it('are there while a variable is wrong', async () => {
    const broken = freshIsolate({ ADMIN_KEY: 'short' });
    for (const path of ['/', '/docs', '/openapi.json']) {
      const response = await call('GET', path, {}, broken);
      expect([path, response.status]).toEqual([path, 200]);
    }
    expect((await call('GET', '/v1/models', {}, broken)).status).toBe(503);
  });
});
