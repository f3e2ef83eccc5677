/**
 * A mask: which blocks of a model run for a request.
 *
 * A block is one attention or one FFN sublayer. Block `2·layer` is the attention of `layer`, block `2·layer + 1` its
 * FFN. A mask holds one bit a block: 1 = the block runs, 0 = it is skipped. A skipped block adds nothing (a hole), or
 * is replaced by its surrogate from a table that belongs to the model. The id is content-addressed (model, block count,
 * bits, table of surrogates if any), so the edge and every backend agree on what an id means without asking each other.
 */
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js';

declare const brand: unique symbol;
/** `dense`, or `m_` and 24 hexadecimal digits. */
export type MaskId = string & { readonly [brand]: 'MaskId' };
/** SHA-256 of the file that a model was imported from, 64 hexadecimal digits. */
export type ModelHash = string & { readonly [brand]: 'ModelHash' };
/** `s_` and 24 hexadecimal digits: the content of a table of surrogates. */
export type SurrogatesId = string & { readonly [brand]: 'SurrogatesId' };

export const DENSE_MASK_ID = 'dense' as MaskId;
export const MASK_ID_PATTERN = /^(dense|m_[0-9a-f]{24})$/;
export const MODEL_HASH_PATTERN = /^[0-9a-f]{64}$/;
export const SURROGATES_ID_PATTERN = /^s_[0-9a-f]{24}$/;

/** The most blocks a mask may have: room for a model of 512 layers. */
export const BLOCK_COUNT_MAX = 1024;

/**
 * `runs[block]` is 1 when the block runs, 0 when it is skipped. `surrogates`: the table whose surrogates stand in
 * for skipped blocks; without it a skipped block adds nothing.
 */
export type Mask = { readonly runs: Uint8Array; readonly surrogates?: SurrogatesId };

export type SkippedLayers = {
  readonly skipAttention: readonly number[];
  readonly skipFfn: readonly number[];
};

export function denseMask(blockCount: number): Mask {
  return { runs: new Uint8Array(blockCount).fill(1) };
}

/** @throws RangeError when a layer lies outside the model. */
export function maskFromSkippedLayers(blockCount: number, skipped: SkippedLayers): Mask {
  const { runs } = denseMask(blockCount);
  const close = (layers: readonly number[], offset: 0 | 1) => {
    for (const layer of layers) {
      const block = 2 * layer + offset;
      if (!Number.isInteger(layer) || layer < 0 || block >= blockCount) {
        throw new RangeError(`layer ${layer} is outside the model (${blockCount / 2} layers)`);
      }
      runs[block] = 0;
    }
  };
  close(skipped.skipAttention, 0);
  close(skipped.skipFfn, 1);
  return { runs };
}

export function skippedLayers(mask: Mask): { skipAttention: number[]; skipFfn: number[] } {
  const skipAttention: number[] = [];
  const skipFfn: number[] = [];
  mask.runs.forEach((runs, block) => {
    if (runs === 0) (block % 2 === 0 ? skipAttention : skipFfn).push(block >> 1);
  });
  return { skipAttention, skipFfn };
}

/** The same mask with surrogates of that table for skipped blocks, or with holes. */
export const withSurrogates = ({ runs }: Mask, surrogates: SurrogatesId | null | undefined): Mask =>
  surrogates == null ? { runs } : { runs, surrogates };

/** The fraction of blocks skipped, 0 to 1. */
export function sparsity(mask: Mask): number {
  let skipped = 0;
  for (const runs of mask.runs) if (runs === 0) skipped++;
  return mask.runs.length === 0 ? 0 : skipped / mask.runs.length;
}

export const isDense = (mask: Mask): boolean => mask.runs.every((runs) => runs === 1);

/** Bits as hexadecimal, block 0 in the highest bit of the first digit; the last digit is padded with zeros. */
export function maskBits(mask: Mask): string {
  let bits = '';
  for (let start = 0; start < mask.runs.length; start += 4) {
    let digit = 0;
    for (let i = 0; i < 4; i++) digit = (digit << 1) | (mask.runs[start + i] ?? 0);
    bits += digit.toString(16);
  }
  return bits;
}

/** The inverse of {@link maskBits}. @throws RangeError on a wrong length, digit or padding. */
export function maskFromBits(blockCount: number, bits: string): Mask {
  if (
    !Number.isInteger(blockCount) ||
    blockCount < 2 ||
    blockCount > BLOCK_COUNT_MAX ||
    blockCount % 2 !== 0
  ) {
    throw new RangeError(`block count ${blockCount} is not an even number from 2 to ${BLOCK_COUNT_MAX}`);
  }
  if (bits.length !== Math.ceil(blockCount / 4) || !/^[0-9a-f]*$/.test(bits)) {
    throw new RangeError(`mask bits must be ${Math.ceil(blockCount / 4)} hexadecimal digits`);
  }
  const runs = new Uint8Array(blockCount);
  for (let block = 0; block < bits.length * 4; block++) {
    const bit = (Number.parseInt(bits[block >> 2]!, 16) >> (3 - (block & 3))) & 1;
    if (block < blockCount) runs[block] = bit;
    else if (bit !== 0) throw new RangeError('mask bits are set past the last block');
  }
  return { runs };
}

/** The content address of a mask: equal for equal (model, block count, bits, surrogates) everywhere. */
export function maskId(model: ModelHash, mask: Mask): MaskId {
  if (isDense(mask)) return DENSE_MASK_ID;
  const blocks = `maskroute-mask-v1\n${model}\n${mask.runs.length}\n${maskBits(mask)}`;
  const text = mask.surrogates === undefined ? blocks : `${blocks}\n${mask.surrogates}`;
  return `m_${bytesToHex(sha256(utf8ToBytes(text))).slice(0, 24)}` as MaskId;
}
