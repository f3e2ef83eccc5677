/**
 * One run of the batched graph (`model/architectures/batched-llama.ts`): new tokens of several sequences, each under its
 * own mask. Here its inputs are written and its outputs are read.
 *
 * Rows: the new tokens of all sequences, one sequence after the other. A mask becomes, for each block, the list of rows that run
 * it. In a layer the sequences that run its attention take the first places, in the order of the inputs.
 */
import { isDense } from '../../shared/mask/mask.ts';
import { BATCH_PLACES } from '../model/architectures/batched-llama.ts';
import type { Feeds, Fetches, Outputs, RuntimeTensor, Session } from '../onnx/session.ts';
import { floats, floatsOrHalves, integers, tensor } from '../onnx/session.ts';
import type { MaskPlan } from './engine.ts';
import { type CacheShape, KvCache, kvTensor, type SequenceCache } from './kv-cache.ts';

/** New tokens of one sequence. */
export type RunInput = {
  readonly cache: SequenceCache;
  /** S new tokens, after those that the cache holds. */
  readonly tokenIds: ArrayLike<number>;
  readonly plan: MaskPlan;
  /** Rows (0 to S-1) whose logits are wanted; none is cheaper than one. */
  readonly logitRows: readonly number[];
};
/** Its cache lies in this process's memory. */
export type HostInput = RunInput & { readonly cache: KvCache };

/** @throws Error for a cache of another runner. */
export function onHost(input: RunInput): HostInput {
  const { cache } = input;
  if (!(cache instanceof KvCache)) throw new Error('a cache of another runner');
  return { ...input, cache };
}

/** Logits of each input's wanted rows, `[logitRows, vocabulary]` each; the caches then hold the new tokens. */
export async function runBatch(
  session: Session,
  shape: CacheShape,
  inputs: readonly HostInput[],
): Promise<Float32Array[]> {
  if (inputs.length > BATCH_PLACES)
    throw new RangeError(`${inputs.length} sequences for ${BATCH_PLACES} places`);
  for (const { cache, tokenIds } of inputs) cache.reserve(tokenIds.length);
  const logits: Float32Array[] = [];
  for (const some of runsOf(inputs, shape.contextTokens))
    logits.push(...(await runOnce(session, shape, some)));
  return logits;
}

/** ONNX Runtime's rotary embedding takes as many rows as its table has positions: more of them are computed in several runs. */
function runsOf(inputs: readonly HostInput[], rowsMax: number): HostInput[][] {
  const runs: HostInput[][] = [];
  let rows = Number.POSITIVE_INFINITY;
  for (const input of inputs) {
    rows += input.tokenIds.length;
    if (rows <= rowsMax) runs.at(-1)!.push(input);
    else {
      runs.push([input]);
      rows = input.tokenIds.length;
    }
  }
  return runs;
}

async function runOnce(
  session: Session,
  shape: CacheShape,
  inputs: readonly HostInput[],
): Promise<Float32Array[]> {
  const rows = placeRows(inputs);
  const feeds = { ...tokenFeeds(inputs, rows), ...maskFeeds(session, shape.layerCount, inputs, rows) };
  const fetches: Fetches = { logits: null };
  bindCaches(feeds, fetches, shape, inputs);
  const outputs = await session.run(feeds, fetches);
  keepSkipped(outputs, shape.layerCount, inputs);
  for (const { cache, tokenIds } of inputs) cache.advance(tokenIds.length);
  return logitsByInput(floats(outputs.logits!), inputs);
}

type RowRange = { readonly from: number; readonly to: number };

function placeRows(inputs: readonly HostInput[]): RowRange[] {
  let to = 0;
  return inputs.map(({ tokenIds }) => {
    const from = to;
    to += tokenIds.length;
    return { from, to };
  });
}

function tokenFeeds(inputs: readonly HostInput[], rows: readonly RowRange[]): Feeds {
  const tokenIds: number[] = [];
  const positions: number[] = [];
  const logitRows: number[] = [];
  inputs.forEach((input, i) => {
    for (let token = 0; token < input.tokenIds.length; token++) {
      tokenIds.push(input.tokenIds[token]!);
      positions.push(input.cache.length + token);
    }
    for (const row of input.logitRows) logitRows.push(rows[i]!.from + row);
  });
  return { token_ids: integers(tokenIds), positions: integers(positions), logit_rows: integers(logitRows) };
}

const runs = ({ plan }: HostInput, block: number): boolean => plan.mask.runs[block] === 1;
/** Whether K and V of rows whose attention is skipped are written. */
export const writesSkipped = ({ plan }: Pick<RunInput, 'plan'>): boolean =>
  plan.kv === 'preserve' || isDense(plan.mask);

function maskFeeds(
  session: Session,
  layerCount: number,
  inputs: readonly HostInput[],
  rows: readonly RowRange[],
): Feeds {
  const rowsWhere = (is: (input: HostInput) => boolean): number[] =>
    inputs.flatMap((input, i) => (is(input) ? range(rows[i]!) : []));
  const blocks = Array.from({ length: 2 * layerCount }, (_, block) => block);
  const layers = blocks.slice(0, layerCount);
  const kept = layers.map((layer) => rowsWhere((one) => !runs(one, 2 * layer) && writesSkipped(one)));
  const running = layers.map((layer) => inputs.filter((one) => runs(one, 2 * layer)));
  const places = running.flatMap((present) =>
    Array.from({ length: BATCH_PLACES }, (_, place): HostInput | undefined => present[place]),
  );
  const feeds: Feeds = {
    ...rowLists(
      'run',
      blocks.map((block) => rowsWhere((one) => runs(one, block))),
    ),
    ...rowLists('kept', kept),
    keeps: flags(kept.map((list) => list.length > 0)),
    place_rows: integers(places.map((one) => one?.tokenIds.length ?? 0)),
    key_counts: integers(
      places.map((one) => (one === undefined ? 1 : one.cache.length + one.tokenIds.length)),
    ),
    has_place: flags(places.map((one) => one !== undefined)),
  };
  if (!session.inputNames.includes('surrogate_rows')) return feeds;
  const replaced = blocks.map((block) =>
    rowsWhere((one) => !runs(one, block) && one.plan.mask.surrogates !== undefined),
  );
  return {
    ...feeds,
    ...rowLists('surrogate', replaced),
    surrogates: flags(replaced.map((list) => list.length > 0)),
  };
}

const range = ({ from, to }: RowRange): number[] => Array.from({ length: to - from }, (_, i) => from + i);

const rowLists = (name: string, lists: readonly (readonly number[])[]): Feeds => ({
  [`${name}_rows`]: integers(lists.flat()),
  [`${name}_counts`]: integers(lists.map((list) => list.length)),
});

const flags = (values: readonly boolean[]): RuntimeTensor =>
  tensor('bool', Uint8Array.from(values, Number), [values.length]);

function bindCaches(feeds: Feeds, fetches: Fetches, shape: CacheShape, inputs: readonly HostInput[]): void {
  // Fed where nobody stands.
  const empty = kvTensor(inputs[0]!.cache.newValues(shape.width), [1, 1, shape.width]);
  const pasts = inputs.map(({ cache, tokenIds }) => cache.past(tokenIds.length));
  const names = cacheNames(shape.layerCount);
  for (let buffer = 0; buffer < 2 * shape.layerCount; buffer++) {
    const layer = buffer >> 1;
    let place = 0;
    inputs.forEach((input, i) => {
      if (!runs(input, 2 * layer)) return;
      const { past, fresh } = names[buffer]![place++]!;
      feeds[past] = pasts[i]![buffer]!;
      fetches[fresh] = input.cache.newRows(buffer, input.tokenIds.length);
    });
    for (; place < BATCH_PLACES; place++) feeds[names[buffer]![place]!.past] = empty;
    if (inputs.some((one) => !runs(one, 2 * layer) && writesSkipped(one)))
      fetches[`kept_${KEY_AND_VALUE[buffer % 2]}_${layer}`] = null;
  }
}

type CacheNames = readonly (readonly { readonly past: string; readonly fresh: string }[])[];
const knownNames = new Map<number, CacheNames>();

/** For each buffer of a cache and each place: what feeds and fetches are called. Hundreds of them, so they are made once. */
function cacheNames(layerCount: number): CacheNames {
  const known = knownNames.get(layerCount);
  if (known !== undefined) return known;
  const made = Array.from({ length: 2 * layerCount }, (_, buffer) =>
    Array.from({ length: BATCH_PLACES }, (_, place) => {
      const of = `${KEY_AND_VALUE[buffer % 2]}_${buffer >> 1}_${place}`;
      return { past: `past_${of}`, fresh: `new_${of}` };
    }),
  );
  knownNames.set(layerCount, made);
  return made;
}

const KEY_AND_VALUE = ['k', 'v'] as const;

/** K and V of rows whose attention is skipped come as one tensor a layer; nothing reads them in this run. */
function keepSkipped(outputs: Outputs, layerCount: number, inputs: readonly HostInput[]): void {
  for (let layer = 0; layer < layerCount; layer++) {
    KEY_AND_VALUE.forEach((name, which) => {
      const kept = outputs[`kept_${name}_${layer}`];
      if (kept === undefined) return;
      let from = 0;
      for (const input of inputs) {
        if (runs(input, 2 * layer) || !writesSkipped(input)) continue;
        from += input.cache.write(2 * layer + which, floatsOrHalves(kept), from, input.tokenIds.length);
      }
    });
  }
}

function logitsByInput(logits: Float32Array, inputs: readonly HostInput[]): Float32Array[] {
  const wanted = inputs.reduce((sum, { logitRows }) => sum + logitRows.length, 0);
  const width = wanted === 0 ? 0 : logits.length / wanted;
  let from = 0;
  return inputs.map(({ logitRows }) => {
    const own = logits.subarray(from, from + logitRows.length * width);
    from += own.length;
    return own;
  });
}
