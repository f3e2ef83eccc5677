/** A bound on the bytes that a cache's values hold together, where what several of them hold lies in memory once. */

export interface Room<V> {
  add(value: V): void;
  remove(value: V): void;
  /** Whether all that the value holds is held anyway, so that it takes no room and frees none. */
  holds(value: V): boolean;
  /** Of the bound: 1 is full. */
  share(): number;
}

/** `partsOf` says what a value holds. The same part, by identity, counts once. */
export function createRoom<V, P>(
  bytesMax: number,
  partsOf: (value: V) => readonly P[],
  bytesOf: (part: P) => number,
): Room<V> {
  const holders = new Map<P, number>();
  let bytes = 0;
  return {
    add(value) {
      for (const part of partsOf(value)) {
        const count = holders.get(part) ?? 0;
        if (count === 0) bytes += bytesOf(part);
        holders.set(part, count + 1);
      }
    },
    remove(value) {
      for (const part of partsOf(value)) {
        const count = holders.get(part) ?? 0;
        if (count > 1) holders.set(part, count - 1);
        else if (holders.delete(part)) bytes -= bytesOf(part);
      }
    },
    holds: (value) => partsOf(value).every((part) => holders.has(part)),
    share: () => bytes / bytesMax,
  };
}
