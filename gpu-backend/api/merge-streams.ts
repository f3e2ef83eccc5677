/**
 * Several streams into one, as their events come. Nothing is read ahead: a stream is asked for its next
 * event only after its last one was taken, so a slow reader slows the streams.
 */

/**
 * Runs at most `atOnce` streams at a time, in order of start. The first that fails ends the whole; leaving
 * the iteration early, or a failure, calls `abandon`, which must make pending streams end.
 */
export async function* mergeStreams<Event>(
  starts: readonly (() => AsyncGenerator<Event, void>)[],
  atOnce: number,
  abandon: () => void,
): AsyncGenerator<Event, void> {
  type Turn = { readonly stream: AsyncGenerator<Event, void>; readonly result: IteratorResult<Event, void> };
  const turns = new Map<AsyncGenerator<Event, void>, Promise<Turn>>();
  const ask = (stream: AsyncGenerator<Event, void>) => {
    const turn = stream.next().then((result) => ({ stream, result }));
    // Once the merge is over nobody waits for this turn any more; its failure is then no news.
    turn.catch(() => {});
    // Re-entered at the end of the map, so that a fast stream does not starve the others.
    turns.delete(stream);
    turns.set(stream, turn);
  };
  let started = 0;
  try {
    while (started < starts.length || turns.size > 0) {
      while (turns.size < atOnce && started < starts.length) ask(starts[started++]!());
      const { stream, result } = await Promise.race(turns.values());
      if (result.done) {
        turns.delete(stream);
        continue;
      }
      yield result.value;
      ask(stream);
    }
  } finally {
    if (turns.size > 0) {
      abandon();
      // Not awaited: an engine that hangs must not hold the client's answer.
      for (const stream of turns.keys()) void stream.return().catch(() => {});
    }
  }
}
