/**
 * One `npm start` with the real model, and all that is asked of a product that runs, part by part: a start takes seconds. The
 * parts are in the files beside this one; the last of them stops the product.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { publicationHistory } from '../../../gpu-backend/publication/publish.ts';
import './requests.ts';
import './tools.ts';
import './dashboard.ts';
import { openPages } from './browser-client.ts';
import { endProduct, forgetProduct, product, startProduct } from './running.ts';
import { openCollector } from './traces.ts';

beforeAll(async () => {
  await startProduct({ ...(await openPages()), ...(await openCollector()) });
}, 120_000);
afterAll(async () => {
  if (product !== undefined) expect(await endProduct()).toBe(0);
  forgetProduct();
}, 60_000);

test('the next start has the same keys, answers, and does not publish the preset again', async () => {
  const { adminKey, apiKey, backendKey, model } = product.dev;
  expect(await endProduct()).toBe(0);
  await startProduct();
  expect(product.dev).toMatchObject({ adminKey, apiKey, backendKey, model });
  const history = await publicationHistory(createAdminClient(product.dev.edge, adminKey), '');
  expect(history).toHaveLength(1);
  const body = { model, messages: [{ role: 'user' as const, content: 'Hello!' }], max_completion_tokens: 4 };
  expect((await product.client.chat.completions.create(body)).choices).toHaveLength(1);
}, 120_000);
