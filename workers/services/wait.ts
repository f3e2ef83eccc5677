/**
 * Waiting for one piece of a stream after the other, for each a while at most, with one timer for many pieces: one a
 * piece would be a fifth of what a token costs the edge.
 */

export interface PieceWait {
  /** What `work` gives or throws, or `late` when it takes longer than the limit. One wait at a time. */
  within<T>(work: Promise<T>): Promise<T | 'late'>;
  /** Nothing is waited for any more. */
  end(): void;
}

export function createPieceWait(limit_ms: number): PieceWait {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let since_ms = 0;
  let giveUp = (_late: 'late'): void => {};

  // A wait that is over by now does not mind being given up.
  const look = (): void => {
    const left_ms = limit_ms - (Date.now() - since_ms);
    timer = left_ms > 0 ? setTimeout(look, left_ms) : undefined;
    if (left_ms <= 0) giveUp('late');
  };

  return {
    within<T>(work: Promise<T>) {
      since_ms = Date.now();
      timer ??= setTimeout(look, limit_ms);
      return new Promise<T | 'late'>((resolve, reject) => {
        giveUp = resolve;
        work.then(resolve, reject);
      });
    },
    end() {
      clearTimeout(timer ?? null);
      timer = undefined;
    },
  };
}
