/** The frame of every page: the menu, the login, and the chosen tenant. */
import type { ComponentType } from 'preact';
import { useLayoutEffect, useRef, useState } from 'preact/hooks';
import { Link, useLocation } from 'wouter-preact';
import type { Session } from '../../shared/admin/admin-wire.ts';
import { ApiError, logOut } from './api.ts';
import { Choice, TenantChoice } from './components/controls.tsx';
import { Confirm } from './components/dialog.tsx';
import { LiveMasks } from './components/mask-heat-map.tsx';
import { ScopeContext, useAddress, useScope } from './hooks.ts';
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
  /** Only for administrators of all tenants. */
  readonly isGlobal?: boolean;
  /** Not for viewers. */
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

/** Why the session may not see a page; undefined if it may. */
function closedTo({ isGlobal, isForChange }: Page, scope: ReturnType<typeof useScope>): string | undefined {
  if (isGlobal === true && !scope.isGlobal) return 'This page is for administrators of all tenants.';
  if (isForChange === true && !scope.mayChange) return 'This page is not for viewers.';
  return undefined;
}

/** The page of the URL; a trailing slash is ignored. */
function usePage(): Page | undefined {
  const [location] = useLocation();
  const path = location.length > 1 ? location.replace(/\/$/, '') : location;
  return PAGES.find((page) => page.path === path);
}

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
        <small>
          Logged in as <code>{session.actor}</code>
          {!mayChange && ', reads only'}
        </small>
        <LogOut onLogOut={onLogOut} />
      </header>
      <div class="frame">
        <Navigation />
        <Content />
      </div>
    </ScopeContext.Provider>
  );
}

/** If the end of a session could not be stored, a copy of it may keep working; the person is warned. */
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

function Navigation() {
  const scope = useScope();
  const current = usePage();
  const [tenant] = useAddress('tenant', '');
  const search = tenant === '' ? '' : `?${new URLSearchParams({ tenant })}`;
  return (
    <nav aria-label="Pages">
      <ul>
        {PAGES.filter((page) => closedTo(page, scope) === undefined).map((page) => (
          <li key={page.path}>
            <Link href={page.path + search} aria-current={page === current ? 'page' : undefined}>
              {page.title}
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
  const scope = useScope();
  const page = usePage();
  const heading = useRef<HTMLHeadingElement>(null);
  const first = useRef(true);
  const title = page?.title ?? 'Not found';
  const closed = page === undefined ? 'There is no such page.' : closedTo(page, scope);
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
      {page === undefined || closed !== undefined ? <p>{closed}</p> : <page.page />}
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
