/** Work that must not overlap: writes of one file, runs of one device, changes of one list. */

/**
 * @returns a function that begins `work` when all earlier work of that function has ended, failed or not, and resolves or
 * rejects as `work` does.
 */
export function oneAtATime(): <T>(work: () => T | Promise<T>) => Promise<T> {
  let last: Promise<unknown> = Promise.resolve();
  return (work) => {
    const done = last.then(work);
    last = done.catch(() => {});
    return done;
  };
}
