/** The two ways in which a model file is refused, worded alike everywhere. */
import { MaskrouteError } from '../../shared/errors.ts';

/** The file contradicts itself or its format: truncated, damaged, or made to harm. */
export const corruptModel = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('corrupt_model', `The model file is damaged: ${reason}.`, { cause });

/** The file is well-formed and asks for something that we do not compute. */
export const unsupportedModel = (reason: string): MaskrouteError =>
  new MaskrouteError('unsupported_model', `The model is not supported: ${reason}.`);
