/** The dashboard's entry: styles, the session's gate, and the pages behind it. */
import '@picocss/pico/css/pico.min.css';
import { QueryClientProvider } from '@tanstack/preact-query';
import { render } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { Router } from 'wouter-preact';
import { z } from 'zod';
import type { Session } from '../../shared/admin/admin-wire.ts';
import { logIn, resume, sessionEnds, signInProvider } from './api.ts';
import { Failure } from './components/dialog.tsx';
import { Layout } from './frame.tsx';
import { queries, useAttempt } from './hooks.ts';
import { applyTheme, storedTheme } from './look.ts';
import { forgetPlaygroundKeys } from './pages/playground-stream.ts';
import './styles.css';

// Zod's compiled schemas need `eval`, which the content security policy forbids.
z.config({ jitless: true });
applyTheme(storedTheme());
render(
  <QueryClientProvider client={queries}>
    <App />
  </QueryClientProvider>,
  document.getElementById('app')!,
);

/* The login until there is a session, then the pages. */

type Gate =
  | { readonly state: 'asking' }
  /** `unchecked`: why the browser's session could not be checked; it may still be good. */
  | { readonly state: 'out'; readonly notice?: string; readonly unchecked?: Error }
  | { readonly state: 'in'; readonly session: Session };

function App() {
  const [gate, setGate] = useState<Gate>({ state: 'asking' });
  /** Clears all cached data and keys, so that the next person to log in sees none. */
  const logOut = (notice: string) => {
    queries.clear();
    forgetPlaygroundKeys();
    setGate({ state: 'out', notice });
  };
  const open = () =>
    resume().then(
      (session) => setGate(session === undefined ? { state: 'out' } : { state: 'in', session }),
      (error: Error) => setGate({ state: 'out', unchecked: error }),
    );
  useEffect(() => {
    sessionEnds(logOut);
    void open();
  }, []);
  switch (gate.state) {
    case 'asking':
      return <main class="container" aria-busy="true" />;
    case 'out':
      return (
        <Login
          notice={gate.notice}
          unchecked={gate.unchecked}
          onRetry={open}
          onSession={(session) => setGate({ state: 'in', session })}
        />
      );
    case 'in':
      return (
        <Router base="/dashboard">
          <Layout session={gate.session} onLogOut={logOut} />
        </Router>
      );
  }
}

/** The login form: exchanges an admin key for a session. The key is sent once and not stored. */
function Login(props: {
  readonly notice: string | undefined;
  readonly unchecked: Error | undefined;
  readonly onRetry: () => void;
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
        <p>Log in with an admin key, the admin key of a tenant, or the key of a viewer.</p>
        {props.notice !== undefined && <p role="status">{props.notice}</p>}
        {props.unchecked !== undefined && <Failure error={props.unchecked} retry={props.onRetry} />}
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
        {signInProvider() !== undefined && (
          <p>
            <a href="/dashboard/sign-in">Sign in through {signInProvider()}</a>
          </p>
        )}
        <small>The key is exchanged for a session of eight hours and is not kept in this browser.</small>
      </article>
    </main>
  );
}
