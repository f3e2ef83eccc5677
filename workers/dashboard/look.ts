/** Light, dark, or as the system says; the choice stays in this browser. */
export const THEMES = ['auto', 'light', 'dark'] as const;
type Theme = (typeof THEMES)[number];

const STORAGE_KEY = 'maskroute-theme';
const darkSystem = matchMedia('(prefers-color-scheme: dark)');
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
  listeners.add(listener);
  darkSystem.addEventListener('change', listener);
  return () => {
    listeners.delete(listener);
    darkSystem.removeEventListener('change', listener);
  };
}

/** Numbers and times for people. */
const dateTime = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

export const when = (iso: string | null): string => (iso === null ? '–' : dateTime.format(new Date(iso)));
export const percent = (share: number, digits = 1): string => `${(100 * share).toFixed(digits)} %`;
export const number = (value: number, digits = 0): string =>
  value.toLocaleString(undefined, { maximumFractionDigits: digits, minimumFractionDigits: digits });
export const shortVersion = (version: string): string => version.slice(0, 10);
export const tenantName = (tenant: string): string => (tenant === '' ? 'default (shared)' : tenant);
