/**
 * Tenants, and the admin API over all that they have. The audit log comes first, while little is in it, and then lists, while
 * there are few tenants.
 */
import { describe } from 'vitest';

describe('audit', async () => void (await import('./admin/audit.ts')));
describe('lists', async () => void (await import('./admin/lists.ts')));
describe('evaluations', async () => void (await import('./admin/evaluations.ts')));
describe('tenants', async () => void (await import('./tenants/tenants.ts')));
describe('budgets', async () => void (await import('./tenants/budgets.ts')));
describe('bursts', async () => void (await import('./tenants/bursts.ts')));
describe('ledger', async () => void (await import('./tenants/ledger.ts')));
