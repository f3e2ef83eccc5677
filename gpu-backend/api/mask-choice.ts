/** Which mask a request runs under: from its `mask` field and its model name. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { MaskId } from '../../shared/mask.ts';
import { DENSE_MASK_ID, maskFromSkippedLayers, maskId, sparsity } from '../../shared/mask.ts';
import type { MaskField } from '../../shared/openai.ts';
import { DENSE_SUFFIX, splitModelName } from '../../shared/protocol.ts';
import type { EngineModel, KvMode, MaskPlan } from '../serving/engine.ts';
import type { MaskRegistry } from '../serving/mask-registry.ts';

export type ChosenMask = { readonly id: MaskId; readonly sparsity: number; readonly plan: MaskPlan };

type MaskRequest = {
  readonly model: string;
  readonly mask?: MaskField | null | undefined;
  readonly kv?: KvMode | null | undefined;
};

/** @throws MaskrouteError `model_not_found` when the request names a model that is not served here. */
export function requireModel(served: string, requested: string): void {
  if (splitModelName(requested).model === served) return;
  throw new MaskrouteError('model_not_found', `The model ${JSON.stringify(requested)} is not served here.`, {
    param: 'model',
  });
}

/**
 * No `mask` means dense. Rejects with MaskrouteError `invalid_request` when the model name and the mask
 * contradict each other or a layer lies outside the model, and with what the registry says about an id.
 */
export async function chooseMask(
  request: MaskRequest,
  model: EngineModel,
  masks: MaskRegistry,
  edge: string | undefined,
): Promise<ChosenMask> {
  const field = request.mask ?? DENSE_MASK_ID;
  const mask =
    typeof field === 'string'
      ? await masks.resolve(field as MaskId, edge)
      : inlineMask(model.blockCount, field);
  const id = maskId(model.hash, mask);
  if (splitModelName(request.model).dense && id !== DENSE_MASK_ID) {
    const message = `A model name that ends in ${DENSE_SUFFIX} takes no mask but "dense".`;
    throw new MaskrouteError('invalid_request', message, { param: 'mask' });
  }
  const surrogate = typeof field === 'string' ? false : field.surrogate;
  return { id, sparsity: sparsity(mask), plan: { mask, kv: request.kv ?? 'preserve', surrogate } };
}

function inlineMask(blockCount: number, field: Exclude<MaskField, string>) {
  try {
    return maskFromSkippedLayers(blockCount, field);
  } catch (error) {
    throw new MaskrouteError('invalid_request', `mask: ${(error as Error).message}.`, { param: 'mask' });
  }
}
