/** Loading for a component: again when what it depends on changes, on demand, or every so often. */
import { useCallback, useEffect, useState } from 'preact/hooks';

export type Load<T> =
  | { readonly state: 'loading' }
  | { readonly state: 'failed'; readonly error: Error }
  | { readonly state: 'ready'; readonly data: T };

/** While it loads again, the last data stays: a page that refreshes does not flicker. */
export function useLoad<T>(
  load: (signal: AbortSignal) => Promise<T>,
  dependencies: readonly unknown[],
  every_ms?: number,
): Load<T> & { readonly reload: () => void } {
  const [round, setRound] = useState(0);
  const [current, setCurrent] = useState<Load<T>>({ state: 'loading' });
  const reload = useCallback(() => setRound((before) => before + 1), []);
  useEffect(() => setCurrent({ state: 'loading' }), dependencies);
  useEffect(() => {
    const controller = new AbortController();
    load(controller.signal).then(
      (data) => controller.signal.aborted || setCurrent({ state: 'ready', data }),
      (error) => controller.signal.aborted || setCurrent({ state: 'failed', error }),
    );
    const timer = every_ms === undefined ? undefined : setTimeout(reload, every_ms);
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [...dependencies, round]);
  return { ...current, reload };
}
