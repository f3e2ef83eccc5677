/** Which mask a request runs under: from its `mask` field and its model name. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { Mask, MaskId } from '../../shared/mask.ts';
import { DENSE_MASK_ID, maskFromSkippedLayers, maskId, sparsity, withSurrogates } from '../../shared/mask.ts';
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
    typeof field === 'string' ? await masks.resolve(field as MaskId, edge) : inlineMask(model, field);
  const id = maskId(model.hash, mask);
  if (splitModelName(request.model).dense && id !== DENSE_MASK_ID) {
    const message = `A model name that ends in ${DENSE_SUFFIX} takes no mask but "dense".`;
    throw new MaskrouteError('invalid_request', message, { param: 'mask' });
  }
  return { id, sparsity: sparsity(mask), plan: { mask, kv: request.kv ?? 'preserve' } };
}

/** `surrogate: true` means those of the table that the served model has. */
function inlineMask({ blockCount, surrogates }: EngineModel, field: Exclude<MaskField, string>): Mask {
  if (field.surrogate && surrogates === undefined) {
    const message = 'This model has no surrogates: ask for "surrogate": false.';
    throw new MaskrouteError('surrogates_mismatch', message, { param: 'mask.surrogate' });
  }
  try {
    return withSurrogates(maskFromSkippedLayers(blockCount, field), field.surrogate ? surrogates : null);
  } catch (error) {
    throw new MaskrouteError('invalid_request', `mask: ${(error as Error).message}.`, { param: 'mask' });
  }
}
