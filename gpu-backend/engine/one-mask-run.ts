/**
 * Runs of the graph that has one mask a run (`model/architectures/llama.ts`): tokens of one sequence, or one token each of several. It
 * has the fewest nodes: a block runs or does not, and no rows are gathered. Here its inputs are written and its outputs are read.
 */

import type { Mask } from '../../shared/mask/mask.ts';
import type { Feeds, RuntimeTensor, Session } from '../onnx/session.ts';
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
  noRows,
  writesSkipped,
} from './run-input.ts';

/** Whether these have one mask and want as many logits. */
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

/** Feeds of every run of the graph: `rows` tokens of each of `sequences` sequences, and their positions. */
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
    runs: runsTensor(plan.mask.runs),
    positions,
    kv_positions: isWhole ? positions : integers([], [sequences, 0]),
    kv_rows: integers([isWhole ? rows : 0]),
    ...surrogateFeeds(session, plan.mask, rows),
  };
}

/** Tokens of one sequence. */
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

/** What a run of a piece is fed, and where it writes K and V: they are rows, and no heads are there. */
export function bindPiece(
  session: Session,
  { config, heads }: HostParts,
  input: HostInput,
): { readonly feeds: Feeds; readonly bound: Bound } {
  const { cache, tokenIds, plan } = input;
  const tokens = tokenIds.length;
  const rowsOf = (layer: number) => (writesSkipped(input) || plan.mask.runs[2 * layer] === 1 ? tokens : 0);
  cache.reserve(tokens);
  const positions = Array.from({ length: tokens }, (_, i) => cache.length + i);
  const feeds: Feeds = {
    token_ids: integers(tokenIds, [1, tokens]),
    ...commonFeeds(session, input, [1, tokens], positions),
    key_count: integers([cache.length + tokens]),
    ...(heads && { is_token: tensor('bool', Uint8Array.of(0), [1]), ...lengthFeeds([]) }),
  };
  const bound: Bound = {};
  const pasts = cache.past(tokens);
  const nothing = heads?.nothing();
  for (let buffer = 0; buffer < 2 * config.layerCount; buffer++) {
    feeds[`past_${nameOf(buffer)}`] = pasts[buffer]!;
    if (nothing !== undefined) feeds[`heads_${nameOf(buffer)}`] = nothing;
    bound[`new_${nameOf(buffer)}`] = cache.newRows(buffer, rowsOf(buffer >> 1));
  }
  return { feeds, bound };
}

/** Tokens of several sequences under one mask: a row for each of neighbouring places. */
export async function runTokens(
  session: Session,
  parts: HostParts,
  heads: HeadCaches,
  inputs: readonly HostInput[],
): Promise<Float32Array[]> {
  const { vocabularySize } = parts.config;
  for (const { cache } of inputs) cache.expect(1);
  const neighbours = neighboursOf(heads, inputs);
  const { rows } = neighbours;
  const pasts = rows.map((input) => input?.cache.length ?? 0);
  const feeds: Feeds = {
    token_ids: integers(
      rows.map((input) => input?.tokenIds[0] ?? 0),
      [rows.length, 1],
    ),
    ...commonFeeds(session, inputs[0]!, [rows.length, 1], pasts),
    key_count: integers([1]),
    is_token: tensor('bool', Uint8Array.of(1), [1]),
    ...lengthFeeds(pasts),
  };
  const wanted = inputs[0]!.logitRows.length;
  const logits = parts.logits.take(rows.length * wanted);
  const fetches: Bound = { logits: tensor('f32', logits, [rows.length, wanted, vocabularySize]) };
  const kept = bindTokens(feeds, fetches, parts, heads, neighbours, inputs[0]!);
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
    for (const { buffer, values } of kept) input.cache.write(buffer, values, row * width, 1);
    input.cache.advance(1);
    const from = row * wanted * vocabularySize;
    found.set(input, logits.subarray(from, from + wanted * vocabularySize));
  });
  return inputs.map((input) => found.get(input)!);
}

/**
 * K and V are among the heads, and no rows are there. Tokens that skip a layer's attention have their K and V there written behind
 * the run: returns those, `[sequences, width]`.
 */
function bindTokens(
  feeds: Feeds,
  fetches: Bound,
  parts: HostParts,
  heads: HeadCaches,
  { from, rows }: Neighbours,
  input: HostInput,
): { readonly buffer: number; readonly values: KvValues }[] {
  const { config, kvType } = parts;
  const width = config.kvHeadCount * config.headSize;
  const view = heads.view(from, from + rows.length);
  const nothing = noRows(parts);
  const kept: { readonly buffer: number; readonly values: KvValues }[] = [];
  for (let buffer = 0; buffer < 2 * config.layerCount; buffer++) {
    feeds[`past_${nameOf(buffer)}`] = nothing;
    feeds[`heads_${nameOf(buffer)}`] = view[buffer]!;
    if (input.plan.mask.runs[2 * (buffer >> 1)] === 1) fetches[`grown_${nameOf(buffer)}`] = view[buffer]!;
    else if (writesSkipped(input)) {
      const values = newValues(kvType, rows.length * width);
      fetches[`new_${nameOf(buffer)}`] = kvTensor(values, [rows.length, 1, width]);
      kept.push({ buffer, values });
    }
  }
  return kept;
}

/** How many rows surrogates compute: all, or none with plain skipping. */
function surrogateFeeds(session: Session, mask: Mask, tokens: number): Feeds {
  if (!session.inputNames.includes('surrogate_rows')) return {};
  return { surrogate_rows: integers([mask.surrogates === undefined ? 0 : tokens]) };
}

const knownRuns = new WeakMap<Uint8Array, RuntimeTensor>();

/** A mask's bits as a tensor, made once a mask. */
function runsTensor(runs: Uint8Array): RuntimeTensor {
  const made = knownRuns.get(runs) ?? tensor('bool', runs, [runs.length]);
  knownRuns.set(runs, made);
  return made;
}
