/**
 * Compares masked answers with the dense model: a small share of requests runs again in the background, once masked and
 * once dense, both with greedy decoding and for a few tokens, and their agreement is sent as an event. It starts after
 * the user's answer, is not charged to a budget, and errors are only logged.
 */
import { z } from 'zod';
import { DENSE_MASK_ID } from '../../shared/mask/mask.ts';
import { splitModelName, weightsOf } from '../../shared/wire/protocol.ts';
import type { BackendPool } from '../backends/pool.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { type Hold, UnderWay } from '../base/waiting.ts';
import { COMPARISON } from '../limits.ts';
import type { RoutableBody, Routed } from '../routing/decision.ts';
import { type Events, lotOf } from './events.ts';

type ComparisonOf = {
  /** The id of the request's event. */
  readonly event: string;
  readonly tenant: string;
  readonly routable: RoutableBody;
  readonly routed: Routed;
  readonly hold: Hold;
};

export interface DenseComparison {
  /** Never throws. Most requests are not compared, and the promise is settled at once. */
  maybeCompare(of: ComparisonOf): Promise<void>;
}

export function createDenseComparison(parts: {
  readonly backend: Pick<BackendPool, 'call'>;
  readonly events: Events;
  /** Share of the requests outside experiments; an experiment has its own share. */
  readonly share: number;
}): DenseComparison {
  const running = new UnderWay();
  return {
    async maybeCompare(of) {
      if (!isSampled(of, parts.share) || running.count() >= COMPARISON.atOnceMax) return;
      const ended = running.begin(2 * COMPARISON.timeout_ms);
      try {
        // Each of the two goes first equally often: the machine's speed may change between them.
        const isMaskedFirst = Number.parseInt(of.event.at(-1)!, 16) % 2 === 0;
        const first = await greedyAnswer(parts.backend, of, isMaskedFirst ? 'masked' : 'dense');
        const second = await greedyAnswer(parts.backend, of, isMaskedFirst ? 'dense' : 'masked');
        const [masked, dense] = isMaskedFirst ? [first, second] : [second, first];
        // Backends may serve other weights under the same name, for example one after the other gets new ones.
        if (masked.weights !== dense.weights) throw new Error('the two answers are of different weights');
        await parts.events.send({
          kind: 'comparison',
          request: of.event,
          tenant: of.tenant,
          created_at_ms: Date.now(),
          agreement: agreementOf(masked.tokens, dense.tokens),
          saved: savedBy(masked, dense),
        });
      } catch (error) {
        log('warn', 'comparison_failed', { request_event: of.event, reason: reasonOf(error) });
      } finally {
        ended();
      }
    },
  };
}

/** Only masks that routing chose are compared, as others say nothing about a mask set. */
function isSampled({ event, routable, routed }: ComparisonOf, share: number): boolean {
  const { decision, assignment } = routed;
  if (decision.cluster === null || decision.fallback !== null || decision.maskId === DENSE_MASK_ID)
    return false;
  if (routable.kind === 'completion' && typeof routable.body.prompt !== 'string') return false;
  const wanted = assignment.arm === null ? share : assignment.shadowShare;
  return lotOf(event) < wanted;
}

/** Tokens before the first difference, as a share of the longer answer. */
export function agreementOf(masked: readonly string[], dense: readonly string[]): number {
  const longer = Math.max(masked.length, dense.length);
  if (longer === 0) return 1;
  const differs = dense.findIndex((token, i) => token !== masked[i]);
  return (differs === -1 ? dense.length : differs) / longer;
}

type Greedy = {
  readonly tokens: readonly string[];
  /** Time per token after the first, measured by the backend; null if it was not, or there was none. */
  readonly perToken_ms: number | null;
  readonly backend: string;
  /** Which weights made it. */
  readonly weights: string;
};

/** The share of time saved; null unless one backend measured both times. */
function savedBy(masked: Greedy, dense: Greedy): number | null {
  if (masked.backend !== dense.backend) return null;
  if (masked.perToken_ms === null || dense.perToken_ms === null || dense.perToken_ms === 0) return null;
  return 1 - masked.perToken_ms / dense.perToken_ms;
}

async function greedyAnswer(
  backend: Pick<BackendPool, 'call'>,
  { event, tenant, routable, routed, hold }: ComparisonOf,
  which: 'masked' | 'dense',
): Promise<Greedy> {
  const { model } = splitModelName(routable.body.model);
  const mask = which === 'dense' ? DENSE_MASK_ID : routed.decision.mask;
  const common = { model, mask, temperature: 0, max_tokens: COMPARISON.tokens };
  const called = await backend.call({
    request: {
      path: routable.kind === 'chat' ? '/v1/chat/completions' : '/v1/completions',
      requestId: `compare_${event}_${which}`,
      tenant,
      body: JSON.stringify(
        routable.kind === 'chat'
          ? { ...common, messages: routable.body.messages, logprobs: true }
          : { ...common, prompt: routable.body.prompt, logprobs: 1 },
      ),
    },
    purpose: {
      kind: 'completion',
      region: routed.assignment.region,
      model,
      // The same for both: only answers of the same weights are compared, and only times of the same backend.
      mask: routed.decision.maskId ?? DENSE_MASK_ID,
      needs: routed.decision.needs,
      conversation: routable,
    },
    time: { timeout_ms: COMPARISON.timeout_ms, isFullTime: false },
    // No retries: a busy backend should not be loaded with comparisons.
    retries: { left: 0 },
    signal: AbortSignal.timeout(COMPARISON.timeout_ms),
    hold,
  });
  if (called.kind === 'error') throw called.error;
  const { response, backend: answerer } = called;
  if (!response.ok) {
    await response.body?.cancel();
    throw new Error(`the backend answered ${response.status}`);
  }
  const { choices, system_fingerprint, maskroute } = answerSchema.parse(await response.json());
  const tokens = choices[0]!.logprobs;
  const later = tokens.length - 1;
  const perToken_ms = maskroute === undefined || later < 1 ? null : maskroute.decode_ms / later;
  return { tokens, perToken_ms, backend: answerer, weights: weightsOf(system_fingerprint) };
}

/** Extracts the answer's tokens in both wire formats. */
const tokensSchema = z.union([
  z.looseObject({ tokens: z.array(z.string()) }).transform(({ tokens }) => tokens),
  z
    .looseObject({ content: z.array(z.looseObject({ token: z.string() })) })
    .transform(({ content }) => content.map(({ token }) => token)),
]);
const answerSchema = z.looseObject({
  choices: z.array(z.looseObject({ logprobs: tokensSchema })).min(1),
  system_fingerprint: z.string(),
  /** Undefined when the backend did not measure the time. */
  maskroute: z
    .looseObject({ decode_ms: z.number().min(0) })
    .optional()
    .catch(undefined),
});
