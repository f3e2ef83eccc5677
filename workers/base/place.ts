/**
 * Where a request came in: what experiments are limited to, answers are labelled with, and wrong keys are counted by.
 * Whoever stands before the worker says so, and anybody can write the same into a request. So nothing is believed unless
 * the operator says who stands there (`TRUSTED_FRONT`): on one machine nobody does.
 */
import type { Place } from '../../shared/mask/sticky.ts';

/** `cloudflare` replaces what clients send as `cf-connecting-ip`, and fills `request.cf`. */
export const FRONTS = ['none', 'cloudflare'] as const;
type Front = (typeof FRONTS)[number];

export const LOCAL_REGION = 'local';

const CODE = /^[A-Z0-9]{2,4}$/;

/** Continent, country and the data centre's code, as far as the front knows them. */
export function placeOf(request: Request, front: Front): Place {
  const cf = front === 'cloudflare' ? (request.cf as Record<string, unknown> | undefined) : undefined;
  const code = (name: string): string | undefined => {
    const value = cf?.[name];
    return typeof value === 'string' && CODE.test(value) ? value : undefined;
  };
  return { continent: code('continent'), country: code('country'), colo: code('colo') };
}

/** `EU/DE/FRA`, as far as it is known; else `local`. */
export function regionOf({ continent, country, colo }: Place): string {
  return [continent, country, colo].filter((part) => part !== undefined).join('/') || LOCAL_REGION;
}

/** The client's address; undefined where nobody can be believed. */
export const addressOf = (request: Request, front: Front): string | undefined =>
  (front === 'cloudflare' ? request.headers.get('cf-connecting-ip') : null) ?? undefined;

/** The client's address, or its network where one customer has many addresses; undefined where nobody can be believed. */
export function networkOf(request: Request, front: Front): string | undefined {
  const address = addressOf(request, front);
  return address === undefined ? undefined : addressGroup(address);
}

const GROUPS_OF_A_NETWORK = 4;
const GROUPS = 8;

/** An IPv6 customer has a network of 2^64 addresses, so its network is what counts. */
export function addressGroup(address: string): string {
  if (!address.includes(':')) return address;
  const [head = '', tail] = address.toLowerCase().split('::');
  const groups = (text: string) => text.split(':').filter((group) => group !== '');
  const [before, after] = [groups(head), groups(tail ?? '')];
  const zeros = Array<string>(Math.max(0, GROUPS - before.length - after.length)).fill('0');
  return [...before, ...zeros, ...after]
    .slice(0, GROUPS_OF_A_NETWORK)
    .map((group) => group.replace(/^0+(?=.)/, ''))
    .join(':');
}
