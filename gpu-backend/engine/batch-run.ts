/**
 * Runs the batched graph (`model/architectures/batched-llama.ts`): new tokens of several sequences, each under its own
 * mask. This file writes the graph's inputs and reads its outputs.
 *
 * Order of the rows: first one token for each of a range of neighbouring places of the head caches (`head-caches.ts`), then
 * the new tokens of all other sequences ("placed" inputs), one sequence after the other. A mask becomes, for each block,
 * the list of rows that run it. Every layer has a few attention nodes for placed inputs; the inputs that run its attention
 * take the first of them, in order.
 */
import { BATCH_PLACES, placesOf } from '../model/architectures/batched-attention.ts';
import type { Feeds, RuntimeTensor, Session } from '../onnx/session.ts';
import { integers, tensor } from '../onnx/session.ts';
import type { HeadCaches } from './head-caches.ts';
import { type KvValues, kvTensor, newValues } from './kv-cache.ts';
import {
  type Bound,
  type HostInput,
  type HostParts,
  isToken,
  lengthFeeds,
  type Neighbours,
  nameOf,
  neighboursOf,
  noRows,
  writesSkipped,
} from './run-input.ts';

/** Advances the caches by the new tokens. @returns for each input its logits, `[logitRows, vocabulary]`. */
export async function runBatch(
  session: Session,
  parts: HostParts,
  inputs: readonly HostInput[],
): Promise<Float32Array[]> {
  for (const input of inputs) input.cache.expect(input.tokenIds.length);
  parts.heads?.place(inputs.map(({ cache }) => cache));
  const logits = new Map<HostInput, Float32Array>();
  for (const some of runsOf(parts, inputs)) await runOnce(session, parts, some, logits);
  return inputs.map((input) => logits.get(input)!);
}

/** Inputs of one run: single tokens, attended together, and inputs with an attention node of their own in each layer. */
type Run = { readonly tokens: readonly HostInput[]; readonly placed: HostInput[] };

/**
 * Splits the inputs into runs. All single tokens go into the first one. A run is limited by the number of attention nodes,
 * and by ONNX Runtime's rotary embedding, which takes at most as many rows as its table has positions.
 */
function runsOf(parts: HostParts, inputs: readonly HostInput[]): Run[] {
  const places = placesOf(parts.kvType);
  const tokens = inputs.filter((input) => isToken(input, parts));
  const runs: Run[] = tokens.length === 0 ? [] : [{ tokens, placed: [] }];
  let rows = tokens.length === 0 ? Number.POSITIVE_INFINITY : BATCH_PLACES;
  for (const input of inputs) {
    if (isToken(input, parts)) continue;
    const last = runs.at(-1);
    rows += input.tokenIds.length;
    const isFree = last !== undefined && !isInTheWay(input, last.tokens);
    if (isFree && rows <= parts.config.contextTokens && last.placed.length < places) {
      last.placed.push(input);
      continue;
    }
    runs.push({ tokens: [], placed: [input] });
    rows = input.tokenIds.length;
  }
  return runs;
}

/**
 * Whether `cache` must not be in a run with `tokens`. A place between those of `tokens` without a token of its own has its
 * first token overwritten and then restored (`HeadCaches.keepFirst`); a sequence that writes its first token in the same
 * run would lose it.
 */
function isInTheWay({ cache }: HostInput, tokens: readonly HostInput[]): boolean {
  const { place } = cache;
  if (place === undefined || cache.length > 0 || tokens.length === 0) return false;
  const places = tokens.map((token) => token.cache.place!);
  return place > Math.min(...places) && place < Math.max(...places);
}

async function runOnce(
  session: Session,
  parts: HostParts,
  { tokens, placed }: Run,
  logits: Map<HostInput, Float32Array>,
): Promise<void> {
  const { config, heads } = parts;
  if (heads === undefined) for (const { cache, tokenIds } of placed) cache.reserveRows(tokenIds.length);
  const neighbours = tokens.length === 0 ? NO_NEIGHBOURS : neighboursOf(tokens);
  const rows = rowsOf(neighbours, placed);
  const feeds: Feeds = { ...tokenFeeds(rows), ...maskFeeds(session, parts, rows) };
  const wanted = rows.inputs.reduce((sum, { logitRows }) => sum + logitRows.length, 0);
  const fetched = parts.logits.take(wanted);
  const fetches: Bound = { logits: tensor('f32', fetched, [wanted, config.vocabularySize]) };
  bindPlaces(feeds, fetches, parts, rows);
  if (heads !== undefined) bindHeads(feeds, fetches, heads, neighbours, rows);
  const kept = bindKept(fetches, parts, rows);
  const putBack = heads?.keepFirst(neighbours.empty);
  try {
    await session.runInPlace(feeds, fetches);
  } finally {
    putBack?.();
  }
  for (const { buffer, values, inputs } of kept) {
    let from = 0;
    for (const { cache, tokenIds } of inputs) from += cache.write(buffer, values, from, tokenIds.length);
  }
  for (const { cache, tokenIds } of rows.inputs) cache.advance(tokenIds.length);
  let from = 0;
  for (const input of rows.inputs) {
    const to = from + input.logitRows.length * config.vocabularySize;
    logits.set(input, fetched.subarray(from, to));
    from = to;
  }
}

const NO_NEIGHBOURS: Neighbours = { from: 0, rows: [], empty: [] };

/** The rows of a run: one for each neighbouring place, then all of each placed input. */
type Rows = {
  readonly neighbours: readonly (HostInput | undefined)[];
  readonly placed: readonly HostInput[];
  /** All inputs, in the order of their rows. */
  readonly inputs: readonly HostInput[];
  readonly of: ReadonlyMap<HostInput, readonly number[]>;
};

function rowsOf({ rows: neighbours }: Neighbours, placed: readonly HostInput[]): Rows {
  const of = new Map<HostInput, readonly number[]>();
  neighbours.forEach((input, row) => {
    if (input !== undefined) of.set(input, [row]);
  });
  let next = neighbours.length;
  for (const input of placed) {
    const first = next;
    of.set(
      input,
      Array.from({ length: input.tokenIds.length }, (_, i) => first + i),
    );
    next += input.tokenIds.length;
  }
  return { neighbours, placed, inputs: [...of.keys()], of };
}

function tokenFeeds({ neighbours, placed, inputs, of }: Rows): Feeds {
  const tokenIds = neighbours.map((input) => input?.tokenIds[0] ?? 0);
  const positions = neighbours.map((input) => input?.cache.length ?? 0);
  for (const input of placed) {
    for (let token = 0; token < input.tokenIds.length; token++) {
      tokenIds.push(input.tokenIds[token]!);
      positions.push(input.cache.length + token);
    }
  }
  const logitRows = inputs.flatMap((input) => input.logitRows.map((row) => of.get(input)![row]!));
  return { token_ids: integers(tokenIds), positions: integers(positions), logit_rows: integers(logitRows) };
}

const runs = ({ plan }: HostInput, block: number): boolean => plan.mask.runs[block] === 1;
/** Whether a layer's attention computes the run's single tokens: it computes all of them if any of them runs it. */
const attendsTokens = ({ neighbours }: Rows, layer: number): boolean =>
  neighbours.some((input) => input !== undefined && runs(input, 2 * layer));

const placedIn = ({ placed }: Rows, layer: number): HostInput[] =>
  placed.filter((input) => runs(input, 2 * layer));

/** Inputs that skip a layer's attention but need K and V, which its attention nodes do not write for them. */
function keptIn(rows: Rows, layer: number): HostInput[] {
  const { placed } = rows;
  const asked = attendsTokens(rows, layer) ? placed : rows.inputs;
  return asked.filter((input) => !runs(input, 2 * layer) && writesSkipped(input));
}

/** Which rows each block computes, and what becomes of the others. */
function maskFeeds(session: Session, parts: HostParts, rows: Rows): Feeds {
  const { neighbours, inputs, of } = rows;
  const rowsOfAll = (some: readonly HostInput[]): number[] => some.flatMap((input) => of.get(input)!);
  const tokens = neighbours.map((_, row) => row);
  const layers = layersOf(parts);
  const blocks = layers.flatMap((layer) => [2 * layer, 2 * layer + 1]);
  const into = blocks.map((block) => rowsOfAll(inputs.filter((one) => runs(one, block))));
  const computed = layers.map((layer) => [
    ...(attendsTokens(rows, layer) ? tokens : []),
    ...rowsOfAll(placedIn(rows, layer)),
  ]);
  const used = computed.map((list, layer) => {
    const wanted = new Set(into[2 * layer]);
    return [...list.keys()].filter((at) => wanted.has(list[at]!));
  });
  const kept = layers.map((layer) => rowsOfAll(keptIn(rows, layer)));
  const feeds: Feeds = {
    ...rowLists(
      'run',
      blocks.map((block) => (block % 2 === 0 ? computed[block >> 1]! : into[block]!)),
    ),
    ...rowLists('into', into),
    ...rowLists('used', used),
    ...rowLists('kept', kept),
    keeps: flags(kept.map((list) => list.length > 0)),
    ...placeFeeds(parts, rows),
  };
  if (!session.inputNames.includes('surrogate_rows')) return feeds;
  const replaced = blocks.map((block) =>
    rowsOfAll(inputs.filter((one) => !runs(one, block) && one.plan.mask.surrogates !== undefined)),
  );
  return {
    ...feeds,
    ...rowLists('surrogate', replaced),
    surrogates: flags(replaced.map((list) => list.length > 0)),
  };
}

const layersOf = ({ config }: HostParts): number[] =>
  Array.from({ length: config.layerCount }, (_, layer) => layer);

/** Who is in the places of each layer's attention, and how long those sequences are. */
function placeFeeds(parts: HostParts, rows: Rows): Feeds {
  const count = placesOf(parts.kvType);
  const layers = layersOf(parts).map((layer) => {
    const some = placedIn(rows, layer);
    return {
      tokens: attendsTokens(rows, layer) ? rows.neighbours.length : 0,
      places: Array.from({ length: count }, (_, place): HostInput | undefined => some[place]),
    };
  });
  const places = layers.flatMap((layer) => layer.places);
  const rowCount = (one: HostInput | undefined): number => one?.tokenIds.length ?? 0;
  const keyCounts = places.map((one) => (one === undefined ? 1 : one.cache.length + one.tokenIds.length));
  const has_place = flags(places.map((one) => one !== undefined));
  if (parts.heads === undefined)
    return { has_place, place_rows: integers(places.map(rowCount)), key_counts: integers(keyCounts) };
  const i32 = (values: readonly number[]) => tensor('i32', Int32Array.from(values), [values.length]);
  return {
    has_place,
    kind_counts: integers(layers.flatMap((layer) => [layer.tokens, ...layer.places.map(rowCount)])),
    place_pasts: i32(keyCounts.map((keys) => keys - 1)),
    place_keys: i32(keyCounts),
    has_tokens: flags(layers.map(({ tokens }) => tokens > 0)),
    tokens_alone: flags(layers.map((layer) => layer.tokens > 0 && layer.places[0] === undefined)),
  };
}

const rowLists = (name: string, lists: readonly (readonly number[])[]): Feeds => ({
  [`${name}_rows`]: integers(lists.flat()),
  [`${name}_counts`]: integers(lists.map((list) => list.length)),
});

const flags = (values: readonly boolean[]): RuntimeTensor =>
  tensor('bool', Uint8Array.from(values, Number), [values.length]);

function bindPlaces(feeds: Feeds, fetches: Bound, parts: HostParts, rows: Rows): void {
  const { config, kvType, heads } = parts;
  const { layerCount } = config;
  const places = placesOf(kvType);
  const empty = heads?.nothing() ?? noRows(parts);
  const kind = heads === undefined ? 'past' : 'heads';
  for (let buffer = 0; buffer < 2 * layerCount; buffer++) {
    const some = placedIn(rows, buffer >> 1);
    for (let place = 0; place < places; place++) {
      const input = some[place];
      const name = `${nameOf(buffer)}_${place}`;
      const pastName = `${kind}_${name}`;
      feeds[pastName] = empty;
      if (input === undefined) continue;
      const { cache, tokenIds } = input;
      const count = tokenIds.length;
      feeds[pastName] = heads?.viewOf(cache)[buffer] ?? cache.past(count)[buffer]!;
      fetches[`new_${name}`] = heads === undefined ? cache.newRows(buffer, count) : feeds[pastName];
    }
  }
}

function bindHeads(
  feeds: Feeds,
  fetches: Bound,
  heads: HeadCaches,
  { from, rows: neighbours }: Neighbours,
  rows: Rows,
): void {
  const pasts = neighbours.map((input) => input?.cache.length ?? 0);
  Object.assign(feeds, lengthFeeds(pasts));
  const view = neighbours.length === 0 ? undefined : heads.view(from, from + neighbours.length);
  const nothing = view === undefined ? heads.nothing() : undefined;
  for (let buffer = 0; buffer < 2 * heads.shape.layerCount; buffer++) {
    feeds[`heads_${nameOf(buffer)}`] = view?.[buffer] ?? nothing!;
    if (view !== undefined && attendsTokens(rows, buffer >> 1))
      fetches[`grown_${nameOf(buffer)}`] = view[buffer]!;
  }
}

/** K or V of the rows that skip a layer's attention: one tensor a buffer, which is copied into the caches after the run. */
type Kept = { readonly buffer: number; readonly values: KvValues; readonly inputs: readonly HostInput[] };

function bindKept(fetches: Bound, { config, kvType }: HostParts, rows: Rows): Kept[] {
  const width = config.kvHeadCount * config.headSize;
  const all: Kept[] = [];
  for (let buffer = 0; buffer < 2 * config.layerCount; buffer++) {
    const inputs = keptIn(rows, buffer >> 1);
    if (inputs.length === 0) continue;
    const count = inputs.reduce((sum, { tokenIds }) => sum + tokenIds.length, 0);
    const values = newValues(kvType, count * width);
    fetches[`kept_${nameOf(buffer)}`] = kvTensor(values, [1, count, width]);
    all.push({ buffer, values, inputs });
  }
  return all;
}
