/** What a stranger's Chromium meets at the running product: OpenAI's own client in a page of another origin, and its pages. */
import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { build } from 'esbuild';
import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { complaintsOf, expectAccessible, openBrowser, openPage } from '../browser.ts';
import { createHome, removeHome, run } from '../product.ts';
import { product } from './running.ts';

/** What the page runs; `ask` is called from here. */
const SCRIPT = `
import OpenAI from 'openai';
globalThis.ask = async ({ edge, apiKey, model }) => {
  const client = new OpenAI({ baseURL: edge + '/v1', apiKey, dangerouslyAllowBrowser: true, maxRetries: 0 });
  const body = { model, messages: [{ role: 'user', content: 'Hello!' }], max_completion_tokens: 4 };
  const told = (response) => Object.fromEntries(response.headers);
  const whole = await client.chat.completions.create(body).withResponse();
  const streamed = await client.chat.completions.create({ ...body, stream: true }).withResponse();
  let chunks = 0;
  for await (const chunk of streamed.data) chunks++;
  const wrong = new OpenAI({ baseURL: edge + '/v1', apiKey: 'mr_live_x', dangerouslyAllowBrowser: true, maxRetries: 0 });
  const refusal = await wrong.models.list().then(() => null, (error) => ({ status: error.status, code: error.code }));
  const admin = await fetch(edge + '/admin/v1/tenants', { headers: { authorization: 'Bearer ' + apiKey } })
    .then(() => 'read', (error) => error.name);
  return { whole: told(whole.response), streamed: told(streamed.response), chunks, refusal, admin };
};`;

type Asked = {
  whole: Record<string, string>;
  streamed: Record<string, string>;
  chunks: number;
  refusal: { status: number; code: string } | null;
  admin: string;
};

let pages: Server[];
export let browser: Browser;

/** The same page at an origin of its own. */
async function servePage(script: string): Promise<Server> {
  const server = createServer((request, response) => {
    const isScript = request.url === '/page.js';
    response.setHeader('content-type', isScript ? 'text/javascript' : 'text/html');
    response.end(isScript ? script : '<!doctype html><title>page</title><script src="/page.js"></script>');
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  return server;
}
const originOf = (server: Server): string => `http://127.0.0.1:${(server.address() as AddressInfo).port}`;

/** What a product needs to let one of the pages in. */
export async function openPages() {
  const { outputFiles } = await build({
    stdin: { contents: SCRIPT, resolveDir: '.', loader: 'js' },
    bundle: true,
    write: false,
    platform: 'browser',
    format: 'iife',
    logLevel: 'error',
  });
  const script = outputFiles[0]!.text;
  pages = [await servePage(script), await servePage(script)];
  return { ALLOWED_ORIGINS: originOf(pages[0]!) };
}
beforeAll(async () => {
  browser = await openBrowser();
}, 120_000);
afterAll(async () => {
  await browser?.close();
  for (const server of pages ?? []) server.close();
}, 60_000);

async function askFrom(server: Server): Promise<Asked> {
  const page: Page = await openPage(browser);
  await page.goto(originOf(server));
  return await page.evaluate<Asked>(`ask(${JSON.stringify(product.dev)})`);
}

test('a page whose origin is allowed talks to the edge, and reads what became of its requests', async () => {
  const { whole, streamed, chunks, refusal, admin } = await askFrom(pages[0]!);
  for (const headers of [whole, streamed]) {
    expect(headers['x-maskroute-mask']).toMatch(/^m_|^dense$/);
    expect(headers['x-request-id']).toBeTruthy();
    expect(headers['server-timing']).toContain('backend');
  }
  expect(chunks).toBeGreaterThan(1);
  expect(refusal).toEqual({ status: 401, code: 'invalid_api_key' });
  expect(admin).toBe('TypeError');
});

test('a page of any other origin is held back by the browser', async () => {
  await expect(askFrom(pages[1]!)).rejects.toThrow(/Connection error|Failed to fetch/);
});

test('a list that no origin stands in stops a start at once, with the reason', async () => {
  const other = createHome();
  try {
    const wrong = run(other, { ALLOWED_ORIGINS: 'app.example.com' });
    expect(await wrong.ended).toBe(2);
    expect(wrong.output()).toMatch(/^error: ALLOWED_ORIGINS: expected .*, not app\.example\.com\.\n$/);
  } finally {
    removeHome(other);
  }
});

test('the edge says what it is and documents its API, wide and light, narrow and dark', async () => {
  const page = await openPage(browser);
  const complaints = complaintsOf(page);
  const wide = { colorScheme: 'light', width: 1400 } as const;
  const narrow = { colorScheme: 'dark', width: 390 } as const;
  const expectGood = async (where: string) => {
    for (const { colorScheme, width } of [narrow, wide]) {
      await page.setViewportSize({ width, height: 900 });
      await page.emulateMedia({ colorScheme });
      await expectAccessible(page, `${where}, ${colorScheme}`, colorScheme === 'light' ? 'all' : 'looks');
      // Wide tables scroll by themselves; the page does not.
      expect(await page.evaluate('document.documentElement.scrollWidth'), where).toBe(width);
    }
  };
  await page.goto(product.dev.edge);
  await expectGood('what this is');
  await page.getByRole('link', { name: 'Documentation of the API' }).click();
  await page.getByRole('heading', { level: 1, name: /^Maskroute API/ }).waitFor();
  await page.getByText('/v1/chat/completions Answer a conversation').click();
  await page.getByText('Make a tenant').click();
  await page.getByRole('cell', { name: 'tokens_per_minute' }).first().waitFor();
  // axe-core judges what is shown, but walks through all that stays closed, too, which is ten times as much.
  await page.evaluate(
    "document.querySelectorAll('details:not([open]) > :not(summary)').forEach((part) => part.remove())",
  );
  await expectGood('documentation');
  expect(complaints).toEqual([]);
  await page.context().close();
});
