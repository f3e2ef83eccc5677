/** The dashboard's entry: styles, the session's gate, and the pages behind it. */
import '@picocss/pico/css/pico.min.css';
import { QueryClientProvider } from '@tanstack/preact-query';
import { render } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { Router } from 'wouter-preact';
import { z } from 'zod';
import type { Session } from '../../shared/admin/admin-wire.ts';
import { logIn, personOf, resume, sessionEnds, signInProvider, stopWaiting } from './api.ts';
import { Dialog, Failure } from './components/dialog.tsx';
import { Layout } from './frame.tsx';
import { hasUnsaved, queries, useAttempt } from './hooks.ts';
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
  /** `ended`: why the session is over; the pages stay behind the login, as something typed there is not saved. */
  | { readonly state: 'in'; readonly session: Session; readonly ended?: string };

function App() {
  const [gate, setGate] = useState<Gate>({ state: 'asking' });
  const logOut = (notice: string) => {
    forgetAll();
    setGate({ state: 'out', notice });
  };
  const onEnd = (notice: string) => {
    if (!hasUnsaved()) {
      logOut(notice);
      return 'left';
    }
    forgetPlaygroundKeys();
    setGate((now) => (now.state === 'in' ? { ...now, ended: notice } : now));
    return 'kept';
  };
  const goOn = (before: Session, session: Session) => {
    if (personOf(before) !== personOf(session)) forgetAll();
    setGate({ state: 'in', session });
  };
  const open = () =>
    resume().then(
      (session) => setGate(session === undefined ? { state: 'out' } : { state: 'in', session }),
      (error: Error) => setGate({ state: 'out', unchecked: error }),
    );
  useEffect(() => {
    sessionEnds(onEnd);
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
        <>
          <Router base="/dashboard">
            {/* Somebody else's pages begin anew. */}
            <Layout key={personOf(gate.session)} session={gate.session} onLogOut={logOut} />
          </Router>
          {gate.ended !== undefined && (
            <LoginAgain
              notice={gate.ended}
              onSession={(session) => goOn(gate.session, session)}
              onLeave={() => {
                logOut('You are logged out.');
                stopWaiting();
              }}
            />
          )}
        </>
      );
  }
}

/** Clears all cached data and keys, so that the next person to log in sees none. */
function forgetAll(): void {
  queries.clear();
  forgetPlaygroundKeys();
}

function Login(props: {
  readonly notice: string | undefined;
  readonly unchecked: Error | undefined;
  readonly onRetry: () => void;
  readonly onSession: (session: Session) => void;
}) {
  return (
    <main class="login">
      <article>
        <h1>Maskroute</h1>
        <p>Log in with an admin key, the admin key of a tenant, or the key of a viewer.</p>
        {props.notice !== undefined && <p role="status">{props.notice}</p>}
        {props.unchecked !== undefined && <Failure error={props.unchecked} retry={props.onRetry} />}
        <KeyForm onSession={props.onSession} />
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

/** The login in front of a form that somebody has filled in. */
function LoginAgain(props: {
  readonly notice: string;
  readonly onSession: (session: Session) => void;
  readonly onLeave: () => void;
}) {
  const { busy, error, attempt } = useAttempt();
  const provider = signInProvider();
  const useSession = () =>
    attempt(async () => {
      const session = await resume();
      if (session === undefined) throw new Error('No tab of this browser has logged in.');
      props.onSession(session);
    });
  return (
    <Dialog title="Log in again" covers onEscape={() => undefined}>
      <p role="status">{props.notice}</p>
      <p>What you typed is still here. It goes on if you log in as the same person as before.</p>
      <KeyForm onSession={props.onSession} />
      <p>
        Or log in{' '}
        <a
          href={provider === undefined ? '/dashboard' : '/dashboard/sign-in'}
          target="_blank"
          rel="noreferrer"
        >
          in another tab{provider !== undefined && ` through ${provider}`}
        </a>
        , come back and go on here.
      </p>
      {error !== undefined && <Failure error={error} />}
      <div class="row">
        <button type="button" class="outline" onClick={useSession} aria-busy={busy} disabled={busy}>
          Go on here
        </button>
        <button type="button" class="danger outline" onClick={props.onLeave}>
          Discard what I typed
        </button>
      </div>
    </Dialog>
  );
}

/** Exchanges an admin key for a session. The key is sent once and not stored. */
function KeyForm({ onSession }: { readonly onSession: (session: Session) => void }) {
  const { busy, error, attempt } = useAttempt();
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const key = String(new FormData(event.currentTarget as HTMLFormElement).get('key')).trim();
    return attempt(async () => onSession(await logIn(key)));
  };
  return (
    <>
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
    </>
  );
}
