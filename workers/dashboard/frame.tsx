/** The frame around every page: the menu, who is logged in, and which tenant is in view. */
import type { ComponentType } from 'preact';
import { useLayoutEffect, useRef, useState } from 'preact/hooks';
import { Link, Route, Switch, useLocation } from 'wouter-preact';
import type { Session } from '../../shared/admin/admin-wire.ts';
import { ApiError, logOut } from './api.ts';
import { Choice, TenantChoice } from './components/controls.tsx';
import { Confirm } from './components/dialog.tsx';
import { LiveMasks } from './components/mask-heat-map.tsx';
import { ScopeContext, useAddress } from './hooks.ts';
import { applyTheme, storedTheme, THEMES, tenantFilter } from './look.ts';
import { Audit } from './pages/audit.tsx';
import { Backends } from './pages/backends.tsx';
import { EmbeddingMap } from './pages/embedding-map.tsx';
import { Experiments } from './pages/experiments.tsx';
import { Keys } from './pages/keys.tsx';
import { Overview } from './pages/overview.tsx';
import { Playground } from './pages/playground.tsx';
import { Quality } from './pages/quality.tsx';
import { Releases } from './pages/releases.tsx';
import { Requests } from './pages/requests.tsx';
import { RoutingShares } from './pages/routing.tsx';
import { Tenants } from './pages/tenants.tsx';
import { Usage } from './pages/usage.tsx';

/* The pages, in the order of the menu. */

type Page = {
  readonly path: string;
  readonly title: string;
  /** Only for those who manage all tenants. */
  readonly isGlobal?: boolean;
  /** Not for those who only read. */
  readonly isForChange?: boolean;
  readonly page: ComponentType;
};

const PAGES: readonly Page[] = [
  { path: '/', title: 'Overview', page: Overview },
  { path: '/requests', title: 'Requests', page: Requests },
  { path: '/releases', title: 'Releases', page: Releases },
  { path: '/masks', title: 'Live masks', page: LiveMasks },
  { path: '/map', title: 'Embedding map', page: EmbeddingMap },
  { path: '/routing', title: 'Routing', page: RoutingShares },
  { path: '/quality', title: 'Quality', page: Quality },
  { path: '/experiments', title: 'Experiments', page: Experiments },
  { path: '/tenants', title: 'Tenants', page: Tenants },
  { path: '/keys', title: 'Keys', page: Keys },
  { path: '/usage', title: 'Usage', page: Usage },
  { path: '/audit', title: 'Audit log', page: Audit },
  { path: '/backends', title: 'Backends', isGlobal: true, page: Backends },
  { path: '/playground', title: 'Playground', isForChange: true, page: Playground },
];

export function Layout({
  session,
  onLogOut,
}: {
  readonly session: Session;
  readonly onLogOut: (notice: string) => void;
}) {
  const [picked, setTenant] = useAddress('tenant', '');
  const isGlobal = session.tenant === null;
  const mayChange = session.role !== 'viewer';
  const tenant = session.tenant ?? picked;
  return (
    <ScopeContext.Provider value={{ session, tenant, isGlobal, mayChange }}>
      <a class="skip" href="#content">
        Skip to the content
      </a>
      <header class="top">
        <strong>Maskroute</strong>
        {isGlobal ? (
          <TenantChoice
            class="inline"
            title="Tenant"
            value={tenant}
            none={tenantFilter('')}
            onPick={setTenant}
          />
        ) : (
          <span>Tenant {tenant}</span>
        )}
        <ThemePicker />
        <LogOut onLogOut={onLogOut} />
      </header>
      <div class="frame">
        <Navigation isGlobal={isGlobal} mayChange={mayChange} />
        <Content />
      </div>
    </ScopeContext.Provider>
  );
}

/** A copy of a session whose end was not written down may go on: the person hears of that. */
const NOT_ENDED =
  'You are logged out here. The edge could not end the session, so a copy of it may work for up to eight hours: log in and log out everywhere.';

const hadEnded = (error: Error): boolean => error instanceof ApiError && error.status === 401;

function LogOut({ onLogOut }: { readonly onLogOut: (notice: string) => void }) {
  const [asks, setAsks] = useState(false);
  const here = () =>
    logOut().then(
      () => onLogOut('You are logged out.'),
      (error: Error) => onLogOut(hadEnded(error) ? 'You are logged out.' : NOT_ENDED),
    );
  const everywhere = async () => {
    await logOut({ everywhere: true });
    onLogOut('You are logged out everywhere.');
  };
  return (
    <>
      <button type="button" class="outline" onClick={here}>
        Log out
      </button>
      <button type="button" class="outline" onClick={() => setAsks(true)}>
        Log out everywhere
      </button>
      {asks && (
        <Confirm
          title="Log out everywhere?"
          action="End all sessions"
          act={everywhere}
          onClose={() => setAsks(false)}
        >
          <p>
            Every session that was opened with the same key ends within five seconds, in other browsers, too.
          </p>
        </Confirm>
      )}
    </>
  );
}

function Navigation(props: { readonly isGlobal: boolean; readonly mayChange: boolean }) {
  const { isGlobal, mayChange } = props;
  const isOpen = (page: Page) => (isGlobal || !page.isGlobal) && (mayChange || !page.isForChange);
  const [location] = useLocation();
  const [tenant] = useAddress('tenant', '');
  const scope = tenant === '' ? '' : `?tenant=${tenant}`;
  return (
    <nav aria-label="Pages">
      <ul>
        {PAGES.filter(isOpen).map(({ path, title }) => (
          <li key={path}>
            <Link href={path + scope} aria-current={location === path ? 'page' : undefined}>
              {title}
            </Link>
          </li>
        ))}
      </ul>
    </nav>
  );
}

/**
 * The heading takes the focus when the page changes, so that a screen reader says which page it is. That happens before
 * the heading is painted, so that nobody meets it with the old title and focus.
 */
function Content() {
  const [location] = useLocation();
  const heading = useRef<HTMLHeadingElement>(null);
  const first = useRef(true);
  const title = PAGES.find((page) => page.path === location)?.title ?? 'Not found';
  useLayoutEffect(() => {
    document.title = `${title} · Maskroute`;
    if (!first.current) heading.current?.focus();
    first.current = false;
  }, [title]);
  return (
    <main id="content">
      <h1 tabIndex={-1} ref={heading}>
        {title}
      </h1>
      <Switch>
        {PAGES.map(({ path, page: Page }) => (
          <Route key={path} path={path}>
            <Page />
          </Route>
        ))}
        <Route>
          <p>There is no such page.</p>
        </Route>
      </Switch>
    </main>
  );
}

function ThemePicker() {
  const [theme, setTheme] = useState(storedTheme());
  return (
    <Choice
      class="inline"
      title="Theme"
      value={theme}
      options={THEMES.map((name) => [name, name])}
      onPick={(picked) => {
        applyTheme(picked);
        setTheme(picked);
      }}
    />
  );
}
