/** How requests reach backends: over the open network, or over a private one that is bound to the worker. */

/** As `fetch`, for absolute addresses. */
export type Send = (url: string, init: RequestInit) => Promise<Response>;

/** `network` is a binding of Workers VPC; without one backends have public names. */
export const sender = (network: Pick<Fetcher, 'fetch'> | undefined): Send =>
  network === undefined ? (url, init) => fetch(url, init) : (url, init) => network.fetch(url, init);
