/** A real Chromium on the dashboard of a running product, with an ear for whatever its policy forbids. */
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { type Browser, chromium, type Page } from 'playwright-core';
import { expect } from 'vitest';
import { findBrowser, NO_BROWSER } from '../../scripts/test-tools.ts';

/** Chromium asks its maker for this and that when it starts; tests ask nobody. */
const QUIET = [
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];

export async function openBrowser(): Promise<Browser> {
  const executablePath = findBrowser();
  if (executablePath === undefined) throw new Error(NO_BROWSER);
  // Root, as in a container, has no sandbox of its own to offer.
  const args = process.getuid?.() === 0 ? [...QUIET, '--no-sandbox'] : QUIET;
  return await chromium.launch({ executablePath, args });
}

/** Colours that are on their way to others are no colours to judge: no transitions. */
export async function openPage(browser: Browser): Promise<Page> {
  const context = await browser.newContext({
    viewport: { width: 1400, height: 900 },
    reducedMotion: 'reduce',
  });
  context.setDefaultTimeout(20_000);
  return await context.newPage();
}

/** What went wrong in the page without anybody seeing it: exceptions, errors in the console, broken policy. */
export function complaintsOf(page: Page): string[] {
  const complaints: string[] = [];
  page.on('pageerror', (error) => complaints.push(`exception: ${error.message}`));
  page.on('console', (message) => {
    if (message.type() === 'error') complaints.push(`console: ${message.text()}`);
  });
  return complaints;
}

export async function logIn(page: Page, edge: string, key: string): Promise<void> {
  await page.goto(`${edge}/dashboard`);
  await page.getByLabel('Admin key').fill(key);
  await page.getByRole('button', { name: 'Log in' }).click();
  await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
}

/** Goes there by the menu and waits for what it loads. */
export async function visit(page: Page, title: string): Promise<void> {
  await page.getByRole('navigation').getByRole('link', { name: title, exact: true }).click();
  await page.getByRole('heading', { level: 1, name: title }).waitFor();
  await expect.poll(() => page.locator('main [aria-busy="true"]').count(), { timeout: 10_000 }).toBe(0);
}

/** As when somebody comes back to the window: what is in view is asked for again. */
export const comeBack = (page: Page): Promise<unknown> =>
  page.evaluate("document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))");

const AXE = createRequire(import.meta.url).resolve('axe-core/axe.min.js');
type AxeResults = { violations: { id: string; help: string; nodes: { html: string }[] }[] };

const AXE_OPTIONS = {
  runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'],
  // All nodes that pass would be described, too.
  resultTypes: ['violations'],
  // No rule of these asks for the rules of styles.
  preload: false,
};

/** Those of the rules that look at colours, which another scheme changes, and at places, too, which another width does. */
const COLOUR_RULES = ['color-contrast', 'link-in-text-block'];
const LOOK_RULES = [...COLOUR_RULES, 'target-size', 'scrollable-region-focusable'];
const RULES = { all: AXE_OPTIONS.runOnly, looks: LOOK_RULES, colours: COLOUR_RULES } as const;

/** No violation of WCAG 2.2 AA that axe-core can see. Its script is let in by the browser, past the page's policy. */
export async function expectAccessible(
  page: Page,
  where: string,
  rules: keyof typeof RULES = 'all',
): Promise<void> {
  if (!(await page.evaluate<boolean>('"axe" in window'))) {
    const session = await page.context().newCDPSession(page);
    await session.send('Runtime.evaluate', { expression: await readFile(AXE, 'utf8') });
    await session.detach();
  }
  const options = { ...AXE_OPTIONS, runOnly: RULES[rules] };
  const results = await page.evaluate<AxeResults>(`axe.run(${JSON.stringify(options)})`);
  const violations = results.violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes[0]?.html}`);
  expect(violations, where).toEqual([]);
}

/** Pages that lie in files are no wider than a telephone or a desk's screen, light and dark. */
export async function expectFits(...files: readonly string[]): Promise<void> {
  const browser = await openBrowser();
  try {
    const page = await browser.newPage();
    for (const file of files) {
      for (const width of [390, 1440]) {
        await page.setViewportSize({ width, height: 900 });
        await page.goto(`file://${file}`);
        for (const colorScheme of ['light', 'dark'] as const) {
          await page.emulateMedia({ colorScheme });
          const excess = await page.evaluate('document.documentElement.scrollWidth - innerWidth');
          expect(excess, `${file}, ${width} px`).toBeLessThanOrEqual(0);
        }
      }
    }
  } finally {
    await browser.close();
  }
}
