/**
 * The Durable Object that keeps one tenant's books: there is one in the world a tenant, and it runs one request
 * at a time, which is what makes a budget exact. It needs no alarm: what is due is done before the next answer.
 */
import { DurableObject } from 'cloudflare:workers';
import type { BudgetLimits, BudgetState, ReserveAnswer, ReserveRequest } from './budgets.ts';
import { type Ledger, openLedger } from './ledger.ts';

export class TenantBudget extends DurableObject {
  readonly #ledger: Ledger;

  constructor(state: DurableObjectState, env: unknown) {
    super(state, env as never);
    this.#ledger = openLedger(state.storage.sql);
  }

  reserve(request: ReserveRequest): ReserveAnswer {
    return this.ctx.storage.transactionSync(() => this.#ledger.reserve(request, Date.now()));
  }

  settle(id: string, tokens: number): void {
    this.ctx.storage.transactionSync(() => this.#ledger.settle(id, tokens, Date.now()));
  }

  states(limits: BudgetLimits): BudgetState[] {
    return this.ctx.storage.transactionSync(() => this.#ledger.states(limits, Date.now()));
  }
}
