/** The login: an admin key for a session. The key is sent once and kept nowhere. */
import { useState } from 'preact/hooks';
import type { Session } from '../../../shared/dashboard.ts';
import { logIn } from '../api.ts';
import { Failure } from '../components/notice.tsx';

export function Login(props: {
  readonly notice: string | undefined;
  readonly onSession: (session: Session) => void;
}) {
  const [error, setError] = useState<Error>();
  const [busy, setBusy] = useState(false);
  const submit = async (event: SubmitEvent) => {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    setBusy(true);
    try {
      props.onSession(await logIn(String(new FormData(form).get('key')).trim()));
    } catch (thrown) {
      setError(thrown as Error);
      setBusy(false);
    }
  };
  return (
    <main class="login">
      <article>
        <h1>Maskroute</h1>
        <p>Log in with an admin key, or with the admin key of a tenant.</p>
        {props.notice !== undefined && <p role="status">{props.notice}</p>}
        {error !== undefined && <Failure error={error} />}
        <form onSubmit={submit}>
          <label>
            Admin key
            <input name="key" type="password" required autocomplete="off" spellcheck={false} />
          </label>
          <button type="submit" aria-busy={busy} disabled={busy}>
            Log in
          </button>
        </form>
        <small>The key is exchanged for a session of eight hours and is not kept in this browser.</small>
      </article>
    </main>
  );
}
