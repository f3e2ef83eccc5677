/** Events pushed on one side, iterated on the other. It holds at most one request's tokens, so it needs no bound. */
export class EventQueue<T> implements AsyncIterable<T> {
  readonly #events: T[] = [];
  #error: unknown;
  #failed = false;
  #wake: (() => void) | undefined;

  push(event: T): void {
    this.#events.push(event);
    this.#wake?.();
  }

  /** Ends the iteration with `error`, after what was pushed before. */
  fail(error: unknown): void {
    this.#failed = true;
    this.#error = error;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (;;) {
      while (this.#events.length > 0) yield this.#events.shift()!;
      if (this.#failed) throw this.#error;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
      this.#wake = undefined;
    }
  }
}
