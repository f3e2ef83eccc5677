/**
 * Seeded random numbers: equal seeds give equal results on every machine, in every version. There are two generators, and
 * neither can be replaced without changing results: `seededRandom` samples tokens, `createRandom` is for learning and
 * measurements.
 */

/**
 * Uniform in [0, 1): splitmix32 (Steele, Lea, Flood 2014, 32-bit constants by C. Wellons). Both halves of a 53-bit seed
 * count, and neighbouring seeds start far apart.
 */
export function seededRandom(seed: number): () => number {
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

export type Random = {
  /** Uniform in [0, 1). */
  next(): number;
  /** Uniform in 0 … n − 1. */
  below(n: number): number;
  /** Standard normal (Box and Muller, 1958). */
  normal(): number;
};

/** mulberry32 (public domain, T. Ettinger): 32 bits of state, enough for sampling a calibration set. */
export function createRandom(seed: number): Random {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return {
    next,
    below: (n) => Math.floor(next() * n),
    normal: () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()),
  };
}

/** A random order of 0 … n − 1 (Fisher and Yates). */
export function permutation(n: number, random: Random): Uint32Array {
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}
