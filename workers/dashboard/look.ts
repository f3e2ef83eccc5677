/** The theme (light, dark or the system's, stored in this browser), and formatting of numbers, times and names. */

export const THEMES = ['auto', 'light', 'dark'] as const;
type Theme = (typeof THEMES)[number];

const STORAGE_KEY = 'maskroute-theme';
const listeners = new Set<() => void>();

export function storedTheme(): Theme {
  const stored = localStorage.getItem(STORAGE_KEY);
  return THEMES.find((theme) => theme === stored) ?? 'auto';
}

export function applyTheme(theme: Theme): void {
  if (theme === 'auto') {
    localStorage.removeItem(STORAGE_KEY);
    delete document.documentElement.dataset.theme;
  } else {
    localStorage.setItem(STORAGE_KEY, theme);
    document.documentElement.dataset.theme = theme;
  }
  for (const listener of listeners) listener();
}

/**
 * Calls `listener` when the theme changes, as charts are drawn and cannot use CSS. Returns a function that stops it.
 */
export function onThemeChange(listener: () => void): () => void {
  const darkSystem = matchMedia('(prefers-color-scheme: dark)');
  listeners.add(listener);
  darkSystem.addEventListener('change', listener);
  return () => {
    listeners.delete(listener);
    darkSystem.removeEventListener('change', listener);
  };
}

/* Formatting for people; unknown values are a dash. */

const timeOfDay = new Intl.DateTimeFormat(undefined, { timeStyle: 'medium' });
const dateTime = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });
const exactTime = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium' });

export const when = (iso: string | null): string => (iso === null ? '–' : dateTime.format(new Date(iso)));
/** With seconds, for what is one among many. */
export const whenExactly = (iso: string): string => exactTime.format(new Date(iso));
export const percent = (share: number | null, digits = 1): string =>
  share === null ? '–' : `${(100 * share).toFixed(digits)} %`;
/** A share in percent, with enough digits that a small share is not shown as 0 % nor a large one as 100 %. */
export function sharePercent(share: number): string {
  const isPart = share > 0 && share < 1;
  const digits = [0, 1, 2].find((count) => !isPart || !/^(0|100)(\.0*)?$/.test((100 * share).toFixed(count)));
  return percent(share, digits ?? 2);
}
export const number = (value: number | null, digits = 0): string =>
  value?.toLocaleString(undefined, { maximumFractionDigits: digits, minimumFractionDigits: digits }) ?? '–';
/** The decimals that show two significant digits of an interval's width; 3 when it has no width. */
export function digitsOf(low: number | null, high: number | null): number {
  const width = low === null || high === null ? 0 : high - low;
  return width > 0 ? Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(width)))) : 3;
}
/** A p-value; a very small one is not shown as 0. */
export const pValue = (p: number | null): string => (p !== null && p < 0.0001 ? '< 0.0001' : number(p, 4));
export const time = (at_ms: number): string => timeOfDay.format(new Date(at_ms));
export const shortVersion = (version: string): string => version.slice(0, 10);
export const experimentName = (experiment: string, variant: string): string =>
  experiment === 'none' ? 'none' : `${experiment} / ${variant}`;

/** `1 h 5 min`, `4 min 10 s`, `9 s`: the two largest parts. */
export function duration(length_ms: number): string {
  const total_s = Math.max(0, Math.ceil(length_ms / 1000));
  const parts = [
    [Math.floor(total_s / 86_400), 'd'],
    [Math.floor(total_s / 3600) % 24, 'h'],
    [Math.floor(total_s / 60) % 60, 'min'],
    [total_s % 60, 's'],
  ] as const;
  const first = parts.findIndex(([count]) => count > 0);
  if (first < 0) return '0 s';
  return parts
    .slice(first, first + 2)
    .filter(([count]) => count > 0)
    .map(([count, unit]) => `${count} ${unit}`)
    .join(' ');
}

/** Behind the state of what this version of the edge cannot read. */
export const unreadableHere = (why: string | undefined): string =>
  why === undefined ? '' : `, but not here: this version cannot read it (${why})`;

/** Names of the empty tenant, in lists of tenants and as an owner of mask sets. */
export const tenantFilter = (tenant: string): string => (tenant === '' ? 'All tenants' : tenant);
export const setOwner = (tenant: string): string => (tenant === '' ? 'Default mask set' : tenant);
/** In a sentence. */
export const whose = (tenant: string): string =>
  tenant === '' ? 'all tenants without a set of their own' : tenant;
