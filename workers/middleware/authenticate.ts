/** Three kinds of callers, three doors: tenants, those who administrate, and backends. */
import { createMiddleware } from 'hono/factory';
import { MaskrouteError } from '../../shared/errors.ts';
import { type AppEnv, holdOf } from '../context.ts';
import { bearerKey } from '../services/api-keys.ts';
import { sameSecret } from '../services/secrets.ts';

/** A tenant's key. Other kinds are refused: a key that administrates should not sit in chat clients. */
export const tenantOnly = createMiddleware<AppEnv>(async (c, next) => {
  const { apiKeys } = c.get('services');
  const caller = await apiKeys.authenticate(bearerKey(c.req.header('authorization')), holdOf(c));
  if (caller.kind !== 'tenant') throw new MaskrouteError('forbidden', 'This key sends no completions.');
  c.set('caller', caller);
  await next();
});

/** The root key, a key of kind `admin`, or a tenant's own admin key (which is held to that tenant). */
export const adminOnly = createMiddleware<AppEnv>(async (c, next) => {
  const { apiKeys, config } = c.get('services');
  const key = bearerKey(c.req.header('authorization'));
  if (sameSecret(key, config.ADMIN_KEY)) {
    c.set('admin', { actor: 'root', tenant: undefined });
  } else {
    const caller = await apiKeys.authenticate(key, holdOf(c));
    if (caller.kind === 'tenant') throw new MaskrouteError('forbidden', 'This key administrates nothing.');
    c.set('admin', { actor: caller.keyId, tenant: caller.kind === 'admin' ? undefined : caller.tenant });
  }
  await next();
});

export const backendOnly = createMiddleware<AppEnv>(async (c, next) => {
  const key = bearerKey(c.req.header('authorization'));
  if (!sameSecret(key, c.get('services').config.BACKEND_KEY)) {
    throw new MaskrouteError('invalid_api_key', 'The backend key is not valid.');
  }
  await next();
});
