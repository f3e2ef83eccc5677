/** A product of its own with its dashboard open in a browser, logged in as who runs everything. */
import type { Browser, Page } from 'playwright-core';
import { expect } from 'vitest';
import { type AdminClient, createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import { complaintsOf, logIn, openBrowser, openPage } from './browser.ts';
import { createHome, removeHome, type Started, start, stop } from './product.ts';

export type Dashboard = {
  readonly home: string;
  readonly product: Started;
  readonly client: AdminClient;
  readonly browser: Browser;
  readonly page: Page;
  /** What went wrong in the page without anybody seeing it. */
  readonly complaints: string[];
};

export async function openDashboard(): Promise<Dashboard> {
  const home = createHome();
  const product = await start(home);
  const client = createAdminClient(product.dev.edge, product.dev.adminKey);
  const browser = await openBrowser();
  const page = await openPage(browser);
  const complaints = complaintsOf(page);
  await logIn(page, product.dev.edge, product.dev.adminKey);
  return { home, product, client, browser, page, complaints };
}

/** Does nothing for one that never opened. */
export async function closeDashboard(dashboard: Dashboard | undefined): Promise<void> {
  if (dashboard === undefined) return;
  await dashboard.browser.close();
  expect(await stop(dashboard.product)).toBe(0);
  removeHome(dashboard.home);
}
