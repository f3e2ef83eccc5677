/** The session's gate: the login until there is one, then the pages. */
import { useEffect, useState } from 'preact/hooks';
import { Router } from 'wouter-preact';
import type { Session } from '../../shared/dashboard.ts';
import { resume, sessionEnds } from './api.ts';
import { Layout } from './layout.tsx';
import { Login } from './pages/login.tsx';

type Gate =
  | { readonly state: 'asking' }
  | { readonly state: 'out'; readonly notice?: string }
  | { readonly state: 'in'; readonly session: Session };

export function App() {
  const [gate, setGate] = useState<Gate>({ state: 'asking' });
  useEffect(() => {
    sessionEnds(() => setGate({ state: 'out', notice: 'The session has ended. Log in again.' }));
    resume().then(
      (session) => setGate(session === undefined ? { state: 'out' } : { state: 'in', session }),
      (error: Error) => setGate({ state: 'out', notice: error.message }),
    );
  }, []);
  switch (gate.state) {
    case 'asking':
      return <main class="container" aria-busy="true" />;
    case 'out':
      return <Login notice={gate.notice} onSession={(session) => setGate({ state: 'in', session })} />;
    case 'in':
      return (
        <Router base="/dashboard">
          <Layout session={gate.session} onLogOut={(notice) => setGate({ state: 'out', notice })} />
        </Router>
      );
  }
}
