/** Bounded waiting. The work goes on when the wait ends; whoever started it holds it with `waitUntil`. */

/** Keeps work alive after the response: the platform's `waitUntil`. */
export type Hold = (work: Promise<unknown>) => void;

export class DeadlineError extends Error {
  constructor(what: string, timeout_ms: number) {
    super(`${what} took more than ${timeout_ms} ms`);
    this.name = 'DeadlineError';
  }
}

/** @throws DeadlineError when `work` is not settled in time; else what `work` gives or throws. */
export async function withDeadline<T>(work: Promise<T>, timeout_ms: number, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const deadline = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new DeadlineError(what, timeout_ms)), timeout_ms);
  });
  try {
    return await Promise.race([work, deadline]);
  } finally {
    clearTimeout(timer ?? null);
  }
}
