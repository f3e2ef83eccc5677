/** Where a request came in: what experiments are limited to and answers are labelled with. */

export const LOCAL_REGION = 'local';

/** `EU/DE/FRA`: continent, country and the data centre's code, as far as they are known; else `local`. */
export function regionOf(request: Request): string {
  const cf = request.cf as { continent?: string; country?: string; colo?: string } | undefined;
  const parts = [cf?.continent, cf?.country, cf?.colo].filter(
    (part): part is string => typeof part === 'string' && /^[A-Z0-9]{2,4}$/.test(part),
  );
  return parts.length === 0 ? LOCAL_REGION : parts.join('/');
}
