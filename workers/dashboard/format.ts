/** Numbers and times for people. */
const dateTime = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

export const when = (iso: string | null): string => (iso === null ? '–' : dateTime.format(new Date(iso)));
export const percent = (share: number, digits = 1): string => `${(100 * share).toFixed(digits)} %`;
export const number = (value: number, digits = 0): string =>
  value.toLocaleString(undefined, { maximumFractionDigits: digits, minimumFractionDigits: digits });
export const shortVersion = (version: string): string => version.slice(0, 10);
export const tenantName = (tenant: string): string => (tenant === '' ? 'default (shared)' : tenant);
