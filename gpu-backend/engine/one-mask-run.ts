/**
 * Runs the graph that takes one mask a run (`model/architectures/one-mask-llama.ts`): tokens of one sequence, or one token each
 * of several. It has the fewest nodes: a block runs or does not, and no rows are gathered. This file writes the graph's inputs
 * and reads its outputs.
 */

import type { Mask } from '../../shared/mask/mask.ts';
import type { Feeds, Session } from '../onnx/session.ts';
import { integers, tensor } from '../onnx/session.ts';
import type { HeadCaches } from './head-caches.ts';
import { type KvValues, kvTensor, newValues } from './kv-cache.ts';
import {
  type Bound,
  type HostInput,
  type HostParts,
  lengthFeeds,
  type Neighbours,
  nameOf,
  neighboursOf,
  writesSkipped,
} from './run-input.ts';

/** Whether all inputs have the same mask plan and the same number of logit rows. */
export function areAlike(inputs: readonly HostInput[]): boolean {
  const first = inputs[0]!;
  const { plan } = first;
  return inputs.every(
    (input) =>
      input.logitRows.length === first.logitRows.length &&
      input.plan.kv === plan.kv &&
      input.plan.mask.surrogates === plan.mask.surrogates &&
      areEqual(input.plan.mask.runs, plan.mask.runs),
  );
}

const areEqual = (a: Uint8Array, b: Uint8Array): boolean =>
  a === b || a.every((value, block) => value === b[block]);

/** The feeds that all runs of the graph have in common, for `rows` tokens of each of `sequences` sequences. */
function commonFeeds(
  session: Session,
  input: HostInput,
  shape: readonly [sequences: number, rows: number],
  positionsFed: readonly number[],
): Feeds {
  const { plan, logitRows } = input;
  const [sequences, rows] = shape;
  const isWhole = writesSkipped(input);
  const positions = integers(positionsFed, shape);
  return {
    logit_rows: integers(logitRows),
    runs: tensor('bool', plan.mask.runs, [plan.mask.runs.length]),
    positions,
    kv_positions: isWhole ? positions : integers([], [sequences, 0]),
    kv_rows: integers([isWhole ? rows : 0]),
    ...surrogateFeeds(session, plan.mask, rows),
  };
}

/** Tokens of one sequence whose K and V are stored as rows. @returns logits `[logitRows, vocabulary]`. */
export async function runPiece(session: Session, parts: HostParts, input: HostInput): Promise<Float32Array> {
  const { cache, tokenIds, logitRows } = input;
  const { feeds, bound } = bindPiece(session, parts, input);
  const { vocabularySize } = parts.config;
  const logits = parts.logits.take(logitRows.length);
  const fetched = tensor('f32', logits, [1, logitRows.length, vocabularySize]);
  await session.runInPlace(feeds, { logits: fetched, ...bound });
  cache.advance(tokenIds.length);
  return logits;
}

/** The feeds of `runPiece`, and the outputs bound to the cache. */
export function bindPiece(
  session: Session,
  { config }: Pick<HostParts, 'config'>,
  input: HostInput,
): { readonly feeds: Feeds; readonly bound: Bound } {
  const { cache, tokenIds, plan } = input;
  const tokens = tokenIds.length;
  const rowsOf = (layer: number) => (writesSkipped(input) || plan.mask.runs[2 * layer] === 1 ? tokens : 0);
  cache.reserveRows(tokens);
  const positions = Array.from({ length: tokens }, (_, i) => cache.length + i);
  const feeds: Feeds = {
    token_ids: integers(tokenIds, [1, tokens]),
    ...commonFeeds(session, input, [1, tokens], positions),
    key_count: integers([cache.length + tokens]),
  };
  const bound: Bound = {};
  const pasts = cache.past(tokens);
  for (let buffer = 0; buffer < 2 * config.layerCount; buffer++) {
    feeds[`past_${nameOf(buffer)}`] = pasts[buffer]!;
    bound[`new_${nameOf(buffer)}`] = cache.newRows(buffer, rowsOf(buffer >> 1));
  }
  return { feeds, bound };
}

/**
 * One token each of several sequences under one mask, or several tokens of one sequence, with K and V in `heads`. The run
 * has a row for every place from the first to the last sequence's.
 * @returns for each input its logits, `[logitRows, vocabulary]`.
 */
export async function runHeads(
  session: Session,
  parts: HostParts,
  heads: HeadCaches,
  inputs: readonly HostInput[],
): Promise<Float32Array[]> {
  const { tokenIds, logitRows } = inputs[0]!;
  const tokens = tokenIds.length;
  for (const { cache } of inputs) cache.expect(tokens);
  heads.place(inputs.map(({ cache }) => cache));
  const neighbours = neighboursOf(inputs);
  const { rows } = neighbours;
  const pasts = rows.map((input) => input?.cache.length ?? 0);
  const each = Array.from({ length: tokens }, (_, token) => token);
  const shape = [rows.length, tokens] as const;
  const feeds: Feeds = {
    token_ids: integers(
      rows.flatMap((input) => each.map((token) => input?.tokenIds[token] ?? 0)),
      shape,
    ),
    ...commonFeeds(
      session,
      inputs[0]!,
      shape,
      pasts.flatMap((past) => each.map((token) => past + token)),
    ),
    ...lengthFeeds(pasts, tokens),
  };
  const wanted = logitRows.length;
  const logits = parts.logits.take(rows.length * wanted);
  const fetches: Bound = {
    logits: tensor('f32', logits, [rows.length, wanted, parts.config.vocabularySize]),
  };
  const kept = bindHeads(feeds, fetches, parts, heads, neighbours, inputs[0]!);
  const putBack = heads.keepFirst(neighbours.empty);
  try {
    await session.runInPlace(feeds, fetches);
  } finally {
    putBack();
  }
  const width = heads.shape.kvHeadCount * heads.shape.headSize;
  const found = new Map<HostInput, Float32Array>();
  rows.forEach((input, row) => {
    if (input === undefined) return;
    for (const { buffer, values } of kept) input.cache.write(buffer, values, row * tokens * width, tokens);
    input.cache.advance(tokens);
    const from = row * wanted * parts.config.vocabularySize;
    found.set(input, logits.subarray(from, from + wanted * parts.config.vocabularySize));
  });
  return inputs.map((input) => found.get(input)!);
}

/**
 * Binds the head caches' buffers. Where a layer's attention is skipped the graph returns K and V instead, to be copied into
 * the caches after the run. @returns those buffers, `[sequences, tokens, width]` each.
 */
function bindHeads(
  feeds: Feeds,
  fetches: Bound,
  { config, kvType }: HostParts,
  heads: HeadCaches,
  { from, rows }: Neighbours,
  input: HostInput,
): { readonly buffer: number; readonly values: KvValues }[] {
  const tokens = input.tokenIds.length;
  const width = config.kvHeadCount * config.headSize;
  const view = heads.view(from, from + rows.length);
  const kept: { readonly buffer: number; readonly values: KvValues }[] = [];
  for (let buffer = 0; buffer < 2 * config.layerCount; buffer++) {
    feeds[`heads_${nameOf(buffer)}`] = view[buffer]!;
    if (input.plan.mask.runs[2 * (buffer >> 1)] === 1) fetches[`grown_${nameOf(buffer)}`] = view[buffer]!;
    else if (writesSkipped(input)) {
      const values = newValues(kvType, rows.length * tokens * width);
      fetches[`new_${nameOf(buffer)}`] = kvTensor(values, [rows.length, tokens, width]);
      kept.push({ buffer, values });
    }
  }
  return kept;
}

/** Number of rows that surrogates compute: all, or 0 if the mask uses none. */
function surrogateFeeds(session: Session, mask: Mask, tokens: number): Feeds {
  if (!session.inputNames.includes('surrogate_rows')) return {};
  return { surrogate_rows: integers([mask.surrogates === undefined ? 0 : tokens]) };
}
