/**
 * Tenants, the admin API over all that they have, and what became of their requests. The audit log comes first, while little is in
 * it, and then lists, while there are few tenants. A database that does not answer comes last.
 */
import { describe } from 'vitest';

describe('audit', async () => void (await import('./admin/audit.ts')));
describe('lists', async () => void (await import('./admin/lists.ts')));
describe('evaluations', async () => void (await import('./admin/evaluations.ts')));
describe('tenants', async () => void (await import('./tenants/tenants.ts')));
describe('budgets', async () => void (await import('./tenants/budgets.ts')));
describe('bursts', async () => void (await import('./tenants/bursts.ts')));
describe('ledger', async () => void (await import('./tenants/ledger.ts')));
describe('completion ids', async () => void (await import('./counting/completion-ids.ts')));
describe('outcomes', async () => void (await import('./counting/outcomes.ts')));
describe('compare dense', async () => void (await import('./counting/compare-dense.ts')));
describe('d1 stalled', async () => void (await import('./db/d1-stalled.ts')));
