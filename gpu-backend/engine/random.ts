/** A seeded generator for sampling: equal seeds give equal tokens on every machine. */

/** Uniform in [0, 1): splitmix32 (Steele, Lea, Flood 2014, 32-bit constants by C. Wellons). */
export function seededRandom(seed: number): () => number {
  // Both halves of a 53-bit seed count, and neighbouring seeds start far apart.
  let state = (Math.imul(Math.floor(seed / 2 ** 32) | 0, 0x9e3779b1) ^ (seed | 0)) | 0;
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = state ^ (state >>> 16);
    mixed = Math.imul(mixed, 0x21f0aaad);
    mixed ^= mixed >>> 15;
    mixed = Math.imul(mixed, 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
  };
}
