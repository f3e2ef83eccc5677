/**
 * Letting a request in: what its tenant may ask for, and the tokens that it may take. The reservation is made while
 * the request is routed, so that it costs no time of its own.
 */
import { MaskrouteError } from '../../shared/errors.ts';
import { splitModelName } from '../../shared/protocol.ts';
import { isUnlimited } from '../budgets/budget.ts';
import type { TenantPolicy } from '../db/tenants.ts';
import type { Caller } from './api-keys.ts';
import type { Patience } from './backends/patience.ts';
import type { Budgets } from './budgets.ts';
import type { CompletionIds } from './completion-ids.ts';
import type { Hold } from './deadline.ts';
import type { Models } from './models.ts';
import { openRecord, type RecordParts, type RequestRecord } from './request-record.ts';
import type { RoutableBody, Routed } from './routing.ts';
import { CONTEXT_UNKNOWN_TOKENS, type TokenBounds, tokenBounds } from './token-bounds.ts';

export type AdmitParts = RecordParts & {
  readonly budgets: Budgets;
  readonly models: Models;
  readonly completionIds: CompletionIds;
};

export type AdmitRequest = {
  readonly caller: Caller;
  readonly routable: RoutableBody;
  readonly patience: Patience;
  readonly signal: AbortSignal;
  readonly hold: Hold;
  /** See `openRecord`. */
  readonly answered: (event: string, routed: Routed) => Promise<void>;
  /** How far the tenant's limits are used, for the client. */
  readonly onLimits: (headers: Record<string, string>) => void;
};

/**
 * `route` runs meanwhile; the record is open when both are done, and closed when either fails.
 * @throws MaskrouteError `model_not_allowed`, what `reserve` throws, and what `route` throws.
 */
export async function admit(
  parts: AdmitParts,
  request: AdmitRequest,
  route: () => Promise<Routed>,
): Promise<{ record: RequestRecord; routed: Routed }> {
  const { caller, routable, patience, signal, hold, answered } = request;
  requireModel(caller.policy, routable.body.model);
  const ids = parts.completionIds.create(caller.tenant);
  const record = openRecord(parts, { ...ids, caller, routable, patience, signal, hold, answered });
  const [reserved, routed] = await Promise.allSettled([
    reserve(parts, request, ids.event, record),
    route().then((decided) => {
      record.routed(decided);
      return decided;
    }),
  ]);
  if (reserved.status === 'rejected') {
    record.refused(reserved.reason);
    throw reserved.reason;
  }
  if (routed.status === 'rejected') {
    record.failed(routed.reason);
    throw routed.reason;
  }
  return { record, routed: routed.value };
}

/** @throws MaskrouteError `model_not_allowed`. */
export function requireModel({ models }: TenantPolicy, name: string): void {
  const { model } = splitModelName(name);
  if (models === null || models.includes(model)) return;
  throw new MaskrouteError('model_not_allowed', `This tenant may not use ${model}.`, { param: 'model' });
}

async function reserve(
  { budgets, models }: AdmitParts,
  { caller, routable, hold, onLimits }: AdmitRequest,
  event: string,
  record: RequestRecord,
): Promise<void> {
  const { tenant, policy } = caller;
  if (isUnlimited(policy.limits)) return;
  const list = await models.list(hold).catch(() => []);
  const { model } = splitModelName(routable.body.model);
  const context = list.find(({ id }) => id === model)?.maskroute?.context_tokens ?? CONTEXT_UNKNOWN_TOKENS;
  const bounds = tokenBounds(routable, context);
  const reservation = await budgets.reserve(tenant, policy.limits, event, bounds, onLimits);
  if (reservation === null) return;
  onLimits(reservation.headers);
  record.reserved(reservation, answerTokensMax(bounds, reservation.tokens));
}

/** An answer of open length is cut where what was granted ends; any other was granted whole. */
const answerTokensMax = (bounds: TokenBounds, granted_tokens: number): number | undefined =>
  bounds.isOpen && granted_tokens < bounds.wanted_tokens
    ? Math.floor((granted_tokens - bounds.prompt_tokens) / bounds.choices)
    : undefined;
