/** The login: an admin key for a session. The key is sent once and kept nowhere. */
import type { Session } from '../../../shared/dashboard.ts';
import { logIn } from '../api.ts';
import { Failure } from '../components/notice.tsx';
import { useAttempt } from '../use-attempt.ts';

export function Login(props: {
  readonly notice: string | undefined;
  readonly onSession: (session: Session) => void;
}) {
  const { busy, error, attempt } = useAttempt();
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const key = String(new FormData(event.currentTarget as HTMLFormElement).get('key')).trim();
    return attempt(async () => props.onSession(await logIn(key)));
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
