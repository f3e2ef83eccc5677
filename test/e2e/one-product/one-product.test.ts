/**
 * One `npm start` with the real model, and all that is asked of a product that runs, part by part: a start takes seconds. The
 * parts are in the files beside this one; the last of them stops the product.
 */
import { afterAll, beforeAll, expect } from 'vitest';
import './requests.ts';
import './tools.ts';
import './dashboard.ts';
import { removeHome, stop } from '../product.ts';
import { openPages } from './browser-client.ts';
import { home, product, startProduct } from './running.ts';
import { openCollector } from './traces.ts';

beforeAll(async () => {
  await startProduct({ ...(await openPages()), ...(await openCollector()) });
}, 120_000);
afterAll(async () => {
  // A product that ended before is not asked again.
  if (product !== undefined) expect(await stop(product)).toBe(0);
  removeHome(home);
}, 60_000);
