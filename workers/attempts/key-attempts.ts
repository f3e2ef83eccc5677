/** The Durable Object that counts wrong administrators' keys: one in the world, so that no isolate has its own count. */
import { DurableObject } from 'cloudflare:workers';
import { KEY_ATTEMPTS } from '../limits.ts';
import { type AttemptAnswer, type AttemptBook, openAttemptBook } from './attempt-book.ts';

export class KeyAttempts extends DurableObject {
  readonly #book: AttemptBook;

  constructor(state: DurableObjectState, env: unknown) {
    super(state, env as never);
    this.#book = openAttemptBook(state.storage.sql, KEY_ATTEMPTS);
  }

  begin(address: string): AttemptAnswer {
    return this.ctx.storage.transactionSync(() => this.#book.begin(address, Date.now()));
  }

  succeeded(attempt: number): void {
    this.ctx.storage.transactionSync(() => this.#book.succeeded(attempt, Date.now()));
  }

  forget(attempt: number): void {
    this.#book.forget(attempt);
  }
}
