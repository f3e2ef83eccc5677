/**
 * Many requests that arrive in one moment are taken up a few at a time. In between the event loop turns, so that tokens of
 * running answers go out and timers come: a hundred refusals in one piece would hold all of them up.
 */

/** Requests that one turn of the event loop takes up: about a millisecond. */
export const PER_TURN = 4;

export class Arrivals {
  readonly #waiting: (() => void)[] = [];
  /** How many more this turn of the loop takes up. */
  #left = PER_TURN;
  #isTurning = false;

  /** Resolves when a request may be taken up: at once, unless many have come. Who comes first goes first. */
  async turn(): Promise<void> {
    this.#resetNextTurn();
    if (this.#left > 0) {
      this.#left--;
      return;
    }
    await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  #resetNextTurn(): void {
    if (this.#isTurning) return;
    this.#isTurning = true;
    setImmediate(() => {
      this.#isTurning = false;
      const now = this.#waiting.splice(0, PER_TURN);
      this.#left = PER_TURN - now.length;
      if (now.length > 0) this.#resetNextTurn();
      for (const resolve of now) resolve();
    });
  }
}
