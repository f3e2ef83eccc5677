/** Where a request came in: what experiments are limited to and answers are labelled with. */
import type { Place } from '../../shared/experiment.ts';

export const LOCAL_REGION = 'local';

const CODE = /^[A-Z0-9]{2,4}$/;

/** Continent, country and the data centre's code, as far as the platform knows them. */
export function placeOf(request: Request): Place {
  const cf = request.cf as Record<string, unknown> | undefined;
  const code = (name: string): string | undefined => {
    const value = cf?.[name];
    return typeof value === 'string' && CODE.test(value) ? value : undefined;
  };
  return { continent: code('continent'), country: code('country'), colo: code('colo') };
}

/** `EU/DE/FRA`, as far as it is known; else `local`. */
export function regionOf(request: Request): string {
  const { continent, country, colo } = placeOf(request);
  return [continent, country, colo].filter((part) => part !== undefined).join('/') || LOCAL_REGION;
}
