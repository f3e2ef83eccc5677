/** An action that the edge may refuse: busy while it runs; when it failed, why, and it can be tried again. */
import { useState } from 'preact/hooks';

export function useAttempt(): {
  readonly busy: boolean;
  readonly error: Error | undefined;
  /** After success it stays busy: what was acted on goes away. */
  attempt(act: () => Promise<void>): Promise<void>;
} {
  const [error, setError] = useState<Error>();
  const [busy, setBusy] = useState(false);
  return {
    busy,
    error,
    async attempt(act) {
      setBusy(true);
      try {
        await act();
      } catch (thrown) {
        setError(thrown as Error);
        setBusy(false);
      }
    },
  };
}
