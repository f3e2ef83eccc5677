/** Where backends reach this edge. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { Config } from '../env.ts';

const LOCAL_HOSTS = ['localhost', '127.0.0.1', '[::1]'];

/** The same address comes with every request, so it is taken apart once. */
let last: { readonly text: string; readonly url: URL } | undefined;

function parsed(text: string): URL {
  if (last?.text !== text) last = { text, url: new URL(text) };
  return last.url;
}

/**
 * `EDGE_URL`, or the request's own origin when that is this machine. Another host's name is never taken from
 * a request: whoever forged it would be sent the backend key.
 * @throws MaskrouteError `configuration_unavailable` when `EDGE_URL` is needed and missing.
 */
export function edgeUrl(config: Pick<Config, 'EDGE_URL'>, request: Request): string {
  if (config.EDGE_URL !== undefined) return config.EDGE_URL;
  const { hostname, origin } = parsed(request.url);
  if (LOCAL_HOSTS.includes(hostname)) return origin;
  throw new MaskrouteError('configuration_unavailable', 'The edge is not configured.', {
    cause: new Error('EDGE_URL is needed outside of localhost'),
  });
}
