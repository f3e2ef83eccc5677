/**
 * Resolves the `mask` field of a request: a mask id or an inline mask. An id that is neither in memory nor on disk is fetched
 * once from the edge and kept. Every record from disk or edge is verified: its id must be the hash of its content.
 */
import { mkdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { LRUCache } from 'lru-cache';
import type { Mask, MaskId, ModelHash, SurrogatesId } from '../../shared/mask/mask.ts';
import {
  DENSE_MASK_ID,
  denseMask,
  maskFromBits,
  maskFromSkippedLayers,
  maskId,
  withSurrogates,
} from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { MaskField } from '../../shared/wire/openai.ts';
import { readAnswer } from '../../shared/wire/parse-body.ts';
import type { MaskRecord } from '../../shared/wire/protocol.ts';
import { internalMaskPath, maskRecordSchema } from '../../shared/wire/protocol.ts';
import { createSigner, type SignFor } from '../../shared/wire/service-token.ts';
import { turnQueue } from '../event-loop.ts';
import { writeWhole } from '../files.ts';
import type { EngineModel } from './engine.ts';

const RECORD_BYTES_MAX = 8192;
const REASON_CHARS_MAX = 300;
const IN_MEMORY_MAX = 4096;
const WAITS = {
  fetch_ms: 3000,
  /** How long a refusal is cached: long enough to protect the edge from retries, short enough for a new publication. */
  unknown_ms: 5000,
  unreachable_ms: 1000,
};

export type MaskRegistry = {
  /**
   * `edge`: the edge's address according to the caller's signed token. Masks are fetched there, unless another address is
   * configured here. The token that this backend sends has that edge as its audience in both cases.
   * Rejects with MaskrouteError `unknown_mask`, `mask_model_mismatch`, or `configuration_unavailable` when the edge cannot
   * be reached; for an inline mask `invalid_request` when a layer is outside the model, or `surrogates_mismatch`.
   */
  resolve(mask: MaskField, edge: string | undefined): Promise<Mask>;
};

type MaskRegistryOptions = {
  /** `MASKROUTE_HOME/masks`; created when the first mask is stored. */
  readonly folder: string;
  readonly model: Pick<EngineModel, 'hash' | 'blockCount' | 'surrogates'>;
  /** Signs the tokens for the edge; the key itself is never sent. */
  readonly backendKey: string;
  /** The edge's address from here; without, the address in the caller's token. */
  readonly edgeUrl: string | undefined;
  readonly warn: (message: string, detail: Record<string, unknown>) => void;
  /** Shorter in tests. */
  readonly waits?: typeof WAITS;
};

/** `url`: where to reach the edge from here; `name`: the address that it has for itself, the audience of its tokens. */
type Edge = { readonly url: string; readonly name: string };

export function createMaskRegistry(options: MaskRegistryOptions): MaskRegistry {
  const { waits = WAITS } = options;
  const sign = createSigner(options.backendKey);
  const known = new LRUCache<MaskId, MaskRecord>({ max: IN_MEMORY_MAX });
  const inFlight = new Map<string, Promise<MaskRecord>>();
  const refusals = new LRUCache<string, MaskrouteError>({ max: IN_MEMORY_MAX });
  /** Many requests may wait for one mask: each goes on in a turn of its own. */
  const turn = turnQueue();

  async function find(id: MaskId, edge: Edge | undefined): Promise<MaskRecord> {
    const record = (await readKept(options, id)) ?? (await fetchRecord(options, sign, id, edge));
    known.set(id, record);
    return record;
  }

  function findOnce(id: MaskId, edge: Edge | undefined): Promise<MaskRecord> {
    const key = `${id} ${edge?.url} ${edge?.name}`;
    const refusal = refusals.get(key);
    if (refusal !== undefined) return Promise.reject(refusal);
    const running = inFlight.get(key);
    if (running !== undefined) return running;
    const search = find(id, edge)
      .catch((error: MaskrouteError) => {
        refusals.set(key, error, {
          ttl: error.code === 'unknown_mask' ? waits.unknown_ms : waits.unreachable_ms,
        });
        throw error;
      })
      .finally(() => inFlight.delete(key));
    inFlight.set(key, search);
    return search;
  }

  return {
    async resolve(field, tokenEdge) {
      if (typeof field !== 'string') return inlineMask(options.model, field);
      const id = field as MaskId;
      if (id === DENSE_MASK_ID) return denseMask(options.model.blockCount);
      const url = options.edgeUrl ?? tokenEdge;
      const edge = url === undefined ? undefined : { url, name: tokenEdge ?? url };
      const record = known.get(id) ?? (await findOnce(id, edge).finally(turn));
      if (record.modelHash !== options.model.hash || record.blockCount !== options.model.blockCount) {
        throw new MaskrouteError('mask_model_mismatch', `The mask ${id} is for another model.`, {
          param: 'mask',
        });
      }
      return maskOf(record);
    },
  };
}

/** `surrogate: true` means the served model's table of surrogates. */
function inlineMask(
  { blockCount, surrogates }: MaskRegistryOptions['model'],
  field: Exclude<MaskField, string>,
): Mask {
  if (field.surrogate && surrogates === undefined) {
    const message = 'This model has no surrogates: send "surrogate": false.';
    throw new MaskrouteError('surrogates_mismatch', message, { param: 'mask.surrogate' });
  }
  try {
    return withSurrogates(maskFromSkippedLayers(blockCount, field), field.surrogate ? surrogates : null);
  } catch (error) {
    throw new MaskrouteError('invalid_request', `mask: ${(error as Error).message}.`, { param: 'mask' });
  }
}

/** @throws Error with the reason when the text is not the record of this id. */
function checkedRecord(text: string, id: MaskId): MaskRecord {
  const record = maskRecordSchema.parse(JSON.parse(text));
  const computed = maskId(record.modelHash as ModelHash, maskOf(record));
  if (record.id !== id || computed !== id) throw new Error(`its content is that of ${computed}`);
  return record;
}

const maskOf = ({ blockCount, bits, surrogates }: MaskRecord): Mask =>
  withSurrogates(maskFromBits(blockCount, bits), surrogates as SurrogatesId | null | undefined);

const keptPath = (options: MaskRegistryOptions, id: MaskId): string => join(options.folder, `${id}.json`);

async function readKept(options: MaskRegistryOptions, id: MaskId): Promise<MaskRecord | undefined> {
  const path = keptPath(options, id);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch {
    return undefined;
  }
  try {
    return checkedRecord(text, id);
  } catch (error) {
    options.warn('a stored mask is damaged; fetching it again', { path, reason: (error as Error).message });
    return undefined;
  }
}

async function fetchRecord(
  options: MaskRegistryOptions,
  sign: SignFor,
  id: MaskId,
  edge: Edge | undefined,
): Promise<MaskRecord> {
  const unknown = (why: string) =>
    new MaskrouteError('unknown_mask', `The mask ${id} is not known: ${why}.`, { param: 'mask' });
  if (edge === undefined) {
    options.warn('a mask could not be fetched', {
      id,
      reason: 'no address of the edge is configured: EDGE_URL at the edge, or MASKROUTE_EDGE_URL here',
    });
    throw unknown('it is not stored here, and no address of the edge is configured to fetch it from');
  }
  const unavailable = (reason: string, cause?: unknown) => {
    options.warn('a mask could not be fetched', { id, edge: edge.url, reason });
    return new MaskrouteError('configuration_unavailable', `The mask ${id} could not be fetched.`, {
      param: 'mask',
      retryAfter_s: 1,
      cause,
    });
  };
  let status: number;
  let text: string;
  try {
    const token = await sign({ tenant: '', edge: '', audience: edge.name, scope: 'masks' });
    const response = await fetch(new URL(internalMaskPath(id), edge.url), {
      headers: { authorization: `Bearer ${token}` },
      redirect: 'error',
      signal: AbortSignal.timeout((options.waits ?? WAITS).fetch_ms),
    });
    status = response.status;
    text = await readAnswer(response, RECORD_BYTES_MAX);
  } catch (error) {
    throw unavailable((error as Error).message, error);
  }
  if (status === 404) throw unknown('the edge does not have it');
  if (status !== 200) throw unavailable(`the edge answered ${status}: ${text.slice(0, REASON_CHARS_MAX)}`);
  let record: MaskRecord;
  try {
    record = checkedRecord(text, id);
  } catch (error) {
    throw unavailable(`the edge's answer is not this mask: ${(error as Error).message}`, error);
  }
  await keep(options, id, record);
  return record;
}

/** Never rejects: without the stored copy the mask is only fetched again after a restart. */
async function keep(options: MaskRegistryOptions, id: MaskId, record: MaskRecord): Promise<void> {
  const path = keptPath(options, id);
  try {
    await mkdir(options.folder, { recursive: true });
    await writeWhole(path, `${JSON.stringify(record)}\n`);
  } catch (error) {
    options.warn('a mask could not be stored on disk', { path, reason: (error as Error).message });
  }
}
