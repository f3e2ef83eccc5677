/** What every page needs to know: who looks, and at which tenant. */
import { createContext } from 'preact';
import { useContext } from 'preact/hooks';
import type { Session } from '../../shared/dashboard.ts';

export type Scope = {
  readonly session: Session;
  /** A tenant's id; empty for the default that tenants without their own use. */
  readonly tenant: string;
  /** Whether the session manages all tenants. */
  readonly isGlobal: boolean;
};

export const ScopeContext = createContext<Scope | undefined>(undefined);

export function useScope(): Scope {
  const scope = useContext(ScopeContext);
  if (scope === undefined) throw new Error('there is no session here');
  return scope;
}
