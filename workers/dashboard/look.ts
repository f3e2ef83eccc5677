/** How the page looks: light, dark, or as the system says, which stays in this browser; and how it writes figures. */

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

/** Charts are drawn and not styled, so they are told when colours change. Returns how to stop listening. */
export function onThemeChange(listener: () => void): () => void {
  const darkSystem = matchMedia('(prefers-color-scheme: dark)');
  listeners.add(listener);
  darkSystem.addEventListener('change', listener);
  return () => {
    listeners.delete(listener);
    darkSystem.removeEventListener('change', listener);
  };
}

/* Numbers, times and names for people; what is not known is a dash. */

const dateTime = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

export const when = (iso: string | null): string => (iso === null ? '–' : dateTime.format(new Date(iso)));
export const percent = (share: number | null, digits = 1): string =>
  share === null ? '–' : `${(100 * share).toFixed(digits)} %`;
export const number = (value: number | null, digits = 0): string =>
  value?.toLocaleString(undefined, { maximumFractionDigits: digits, minimumFractionDigits: digits }) ?? '–';
export const shortVersion = (version: string): string => version.slice(0, 10);
export const tenantName = (tenant: string): string => (tenant === '' ? 'default (shared)' : tenant);
