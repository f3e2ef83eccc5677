/** The dry run: the same body, the same decision, no backend. */
import { Hono } from 'hono';
import type { SkippedLayers } from '../../shared/mask/mask.ts';
import { DENSE_MASK_ID, maskFromBits, skippedLayers } from '../../shared/mask/mask.ts';
import type { DryRun } from '../../shared/wire/openai.ts';
import { tenantOnly } from '../http/authentication.ts';
import { type AppEnv, holdOf } from '../http/context.ts';
import { methodNotAllowed } from '../http/error-answers.ts';
import { readJson } from '../http/request-body.ts';
import type { Decision } from '../routing/decision.ts';
import { routeEcho } from '../routing/decision.ts';
import type { RoutingTable } from '../routing/live-sets.ts';
import { requireModel } from './admission.ts';
import { decisionHeaders, parseChat, parseCompletion, parseResponse, route, setHeaders } from './complete.ts';
import { purposeOf } from './forward.ts';

export const dryRun = new Hono<AppEnv>()
  .post('/route', tenantOnly, async (c) => {
    const { routable, ignored } = parseAny(await readJson(c.req.raw));
    requireModel(c.var.caller.policy, routable.body.model);
    const routed = await route(c, routable);
    const { decision, encoder, timings } = routed;
    setHeaders(c, { ...decisionHeaders(routed), ...ignored });
    const { caller, services } = c.var;
    const home = await services.backend.home(purposeOf(routed, routable), caller.tenant, holdOf(c));
    const skip = skippedBy(decision, services.table);
    return c.json({
      object: 'maskroute.route',
      request_id: c.get('requestId'),
      model: routable.body.model,
      mask: decision.mask,
      sparsity: decision.sparsity,
      skip: skip && { attention: [...skip.skipAttention], ffn: [...skip.skipFfn] },
      label: decision.cluster === null ? null : (decision.set?.clusters[decision.cluster]?.label ?? null),
      distance: decision.distance,
      maskroute: routeEcho(routed),
      backend: home ?? null,
      encoder,
      timings_ms: { assign: timings.assign_ms, embed: timings.embed_ms, route: timings.route_ms },
    } satisfies DryRun);
  })
  .all('/route', methodNotAllowed('POST'));

/** A body with `messages` is a chat, one with `input` is of the newer wire, any other a completion. */
function parseAny(raw: unknown): ReturnType<typeof parseChat> {
  const has = (name: string) => typeof raw === 'object' && raw !== null && name in raw;
  if (has('messages')) return parseChat(raw);
  return has('input') ? parseResponse(raw) : parseCompletion(raw);
}

function skippedBy({ mask }: Decision, table: RoutingTable): SkippedLayers | null {
  if (typeof mask !== 'string') return mask;
  if (mask === DENSE_MASK_ID) return { skipAttention: [], skipFfn: [] };
  const held = table.findMask(mask);
  return held === undefined
    ? null
    : skippedLayers(maskFromBits(held.set.model.blockCount, held.cluster.bits));
}
