/**
 * Where a request came from: its place limits experiments and labels answers, and its address counts wrong keys. A
 * trusted proxy in front of the worker reports it, but clients can forge the same headers. So it is used only if the
 * operator names the proxy (`TRUSTED_FRONT`); on one machine there is none.
 */
import type { Place } from '../../shared/mask/sticky.ts';

/** `cloudflare` replaces what clients send as `cf-connecting-ip`, and fills `request.cf`. */
export const FRONTS = ['none', 'cloudflare'] as const;
type Front = (typeof FRONTS)[number];

export const LOCAL_REGION = 'local';

const CODE = /^[A-Z0-9]{2,4}$/;

/** Continent, country and data centre code, as far as the proxy reports them. */
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

/** The client's IP address; undefined without a trusted proxy. */
export const addressOf = (request: Request, front: Front): string | undefined =>
  (front === 'cloudflare' ? request.headers.get('cf-connecting-ip') : null) ?? undefined;

/** The client's IP address, or its network where one customer has many addresses; undefined without a trusted proxy. */
export function networkOf(request: Request, front: Front): string | undefined {
  const address = addressOf(request, front);
  return address === undefined ? undefined : addressGroup(address);
}

const GROUPS_OF_A_NETWORK = 4;
const GROUPS = 8;

/** An IPv6 customer has 2^64 addresses, so the /64 network is counted instead. */
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
