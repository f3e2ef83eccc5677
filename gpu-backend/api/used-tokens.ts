/**
 * Tokens that were used: each is for one request, so one that somebody caught on its way opens nothing. What is
 * remembered is bounded by the tokens' short life; past a number of them the oldest are forgotten first.
 */

export type UsedTokens = {
  /** Whether this is the first use. `until_s`: when the token is worthless anyway. */
  use(nonce: string, until_s: number, now_s: number): boolean;
};

/** At a thousand requests a second, the ninety seconds that a token can be used in. */
const REMEMBERED_MAX = 100_000;

export function createUsedTokens(rememberedMax = REMEMBERED_MAX): UsedTokens {
  /** In order of use, which is nearly the order in which they end. */
  const until = new Map<string, number>();
  return {
    use(nonce, until_s, now_s) {
      for (const [old, end_s] of until) {
        if (end_s >= now_s && until.size < rememberedMax) break;
        until.delete(old);
      }
      if (until.has(nonce)) return false;
      until.set(nonce, until_s);
      return true;
    },
  };
}
