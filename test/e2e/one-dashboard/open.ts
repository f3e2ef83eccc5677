/**
 * A product of its own with its dashboard open in a browser, logged in as who runs everything. Its model is small and means
 * nothing, but where pictures are drawn; a mask set like the preset is live.
 */
import type { Browser, Page } from 'playwright-core';
import { expect } from 'vitest';
import { type AdminClient, createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { publishMaskSet, readMaskSet } from '../../../gpu-backend/publication/publish.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { complaintsOf, logIn, openBrowser, openPage } from '../browser.ts';
import {
  createHome,
  createTinyHome,
  PRESET,
  removeHome,
  type Started,
  start,
  stop,
  tinyPreset,
} from '../product.ts';

export type Dashboard = {
  readonly home: string;
  readonly product: Started;
  readonly client: AdminClient;
  /** What is live. */
  readonly preset: MaskSet;
  readonly browser: Browser;
  readonly page: Page;
  /** What went wrong in the page without anybody seeing it. */
  readonly complaints: string[];
};

/** What `one-dashboard.test.ts` opens, as its parts see it. */
export let dashboard: Dashboard;

export async function openDashboard(): Promise<void> {
  const isPictured = process.env.SCREENSHOTS === '1';
  const home = isPictured ? createHome() : await createTinyHome();
  const product = await start(home);
  try {
    const client = createAdminClient(product.dev.edge, product.dev.adminKey);
    const preset = isPictured ? await readMaskSet(PRESET) : await tinyPreset();
    if (!isPictured) await publishMaskSet(client, preset, { tenant: '', activate: true });
    const browser = await openBrowser();
    const page = await openPage(browser);
    const complaints = complaintsOf(page);
    await logIn(page, product.dev.edge, product.dev.adminKey);
    dashboard = { home, product, client, preset, browser, page, complaints };
  } catch (error) {
    await stop(product);
    throw error;
  }
}

/** Does nothing for one that never opened. */
export async function closeDashboard(): Promise<void> {
  if (dashboard === undefined) return;
  await dashboard.browser.close();
  expect(await stop(dashboard.product)).toBe(0);
  removeHome(dashboard.home);
}
