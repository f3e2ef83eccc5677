/**
 * Quality and speed of quantized weights and of surrogates.
 *
 * `bench quantization`: scores each kind of text on the quantized models, dense, under masks, and with K and V in half
 * precision, against the same model in fp32; times a token in interleaved rounds. `timesEightBits` is the speedup over
 * eight bits, dense.
 *
 * All kinds weigh the same, however many rows they have. The text must differ from the text that models were calibrated on.
 */
import { cp, mkdtemp, rm, stat } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  type Mask,
  maskFromBits,
  maskFromSkippedLayers,
  sparsity,
  withSurrogates,
} from '../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readData } from '../learning/data/read-data.ts';
import { drawSamples, type Sample } from '../learning/data/samples.ts';
import {
  addScores,
  createScorer,
  figuresOf,
  openScoreSession,
  type Reference,
  type SampleScores,
  type ScoreSession,
} from '../learning/search/score-masks.ts';
import { learnSurrogates } from '../learning/surrogates/learn-surrogates.ts';
import { interleaved, round } from '../measure.ts';
import { WEIGHTS_FILE } from '../model/emit.ts';
import { KV_TYPES, type KvType } from '../model/model-source.ts';
import { DEFAULT_MODEL } from '../model/sources/resolve.ts';
import { modelsFolder, openInstalled } from '../model/store.ts';
import { checkRank, installSurrogates } from '../model/surrogates.ts';
import { openModelText } from '../model/tokenizer/model-text.ts';
import { createRandom } from '../random.ts';
import { openEngine } from './decode.ts';

const REFERENCE = `${DEFAULT_MODEL}-f32`;
const EIGHT_BITS = DEFAULT_MODEL;
const FOUR_BITS = `${DEFAULT_MODEL}-q4`;
const BY_COLUMN = `${DEFAULT_MODEL}-q8-columns`;
const SEED = 9;
const TOKENS_MAX = 256;
const POSITION = 64;

type QuantizationOptions = {
  readonly home: string;
  readonly data: readonly string[];
  /** Scored positions of each kind. */
  readonly positions: number;
  readonly rounds: number;
  /** Mask sets; the mask of each set's largest cluster is scored, too. */
  readonly maskSets: readonly MaskSet[];
  readonly say: (line: string) => void;
  readonly signal: AbortSignal;
};

type Engine = Awaited<ReturnType<typeof openEngine>>;
/** A model under a mask. */
type Candidate = {
  readonly name: string;
  readonly kvType: KvType;
  readonly engine: Engine;
  readonly mask: Mask;
};

export async function benchQuantization(options: QuantizationOptions): Promise<object> {
  await using opened = new AsyncDisposableStack();
  const open = async (model: string, kvType: KvType): Promise<Engine> => {
    const engine = await openEngine(options.home, model, { kvType });
    opened.defer(() => engine.runner.close());
    return engine;
  };
  const reference = await open(REFERENCE, 'f32');
  const session = await openScoreSession(availableParallelism());
  opened.defer(() => session.close());
  const candidates: Candidate[] = [];
  for (const model of await quantizedModels(options)) {
    for (const kvType of KV_TYPES)
      candidates.push(...candidatesOf(kvType, await open(model, kvType), options));
  }
  const kinds = await drawKinds(reference, options);
  const figures = await scoreKinds(options, session, reference, candidates, kinds);
  const times = await timeCandidates(options, candidates);
  const base_ms = times.get(candidates[0]!.name)!;
  const rows = [];
  for (const { name, kvType, engine, mask } of candidates) {
    const { kl, agreement, perplexity, byKind } = figures.get(name)!;
    const { size } = await stat(join(engine.folder, WEIGHTS_FILE));
    const ms = times.get(name)!;
    const row = {
      name,
      model: engine.manifest.name,
      kvType,
      sparsity: round(sparsity(mask)),
      weights_MB: round(size / 1e6, 1),
      kl: round(kl, 4),
      agreement: round(agreement),
      perplexityTimes: round(perplexity, 4),
      msPerToken: round(ms, 2),
      timesEightBits: round(base_ms / ms),
      byKind,
    };
    options.say(
      `${name}: KL ${row.kl}, top token ${row.agreement}, perplexity × ${row.perplexityTimes}, ${row.msPerToken} ms`,
    );
    rows.push(row);
  }
  return { bench: 'quantization', reference: REFERENCE, kinds: [...kinds.keys()], rows };
}

/** Weights by column are for some processors only, so they may be missing. */
async function quantizedModels({ home, say }: QuantizationOptions): Promise<string[]> {
  const byColumn = await openInstalled(home, BY_COLUMN).catch(() => undefined);
  if (byColumn !== undefined) return [EIGHT_BITS, FOUR_BITS, BY_COLUMN];
  say(`${BY_COLUMN} is not installed, and is left out.`);
  return [EIGHT_BITS, FOUR_BITS];
}

/** Dense, and under masks only with K and V in fp32. */
function candidatesOf(kvType: KvType, engine: Engine, { maskSets }: QuantizationOptions): Candidate[] {
  const { name: model, weights: name } = engine.manifest;
  const held = { kvType, engine };
  if (kvType !== 'f32') return [{ ...held, name: `${name} dense, K and V in ${kvType}`, mask: engine.dense }];
  const masked = maskSets.map((set) => {
    const { surrogates } = engine.runner;
    if (set.surrogates !== surrogates)
      throw new MaskrouteError(
        'surrogates_mismatch',
        `${set.name} is for other surrogates than ${model} has.`,
      );
    const mask = withSurrogates(commonestMask(set), surrogates);
    const percent = Math.round(100 * sparsity(mask));
    // Sets of one name differ in their versions.
    return { name: `${name}, ${percent} % out (${set.name} ${maskSetVersion(set)})`, ...held, mask };
  });
  return [{ ...held, name: `${name} dense`, mask: engine.dense }, ...masked];
}

function commonestMask({ clusters, model }: MaskSet): Mask {
  const [commonest] = clusters.toSorted((a, b) => b.share - a.share);
  return maskFromBits(model.blockCount, commonest!.bits);
}

/** Samples of every kind of text. */
async function drawKinds(
  { folder, manifest }: Engine,
  { data, positions }: QuantizationOptions,
): Promise<Map<string, Sample[]>> {
  const text = await openModelText(folder, manifest);
  const rows = await readData(data);
  const byKind = Map.groupBy(rows, ({ kind }) => kind);
  const { contextTokens } = manifest.config;
  const options = { positions, tokensMax: TOKENS_MAX, contextTokens };
  return new Map(
    [...byKind].map(([kind, some]) => [
      kind,
      drawSamples(some, text, manifest.eosTokenIds[0]!, createRandom(SEED), options),
    ]),
  );
}

type Figures = { kl: number; agreement: number; perplexity: number; byKind: Record<string, object> };

async function scoreKinds(
  { say, signal }: QuantizationOptions,
  session: ScoreSession,
  reference: Engine,
  candidates: readonly Candidate[],
  kinds: ReadonlyMap<string, readonly Sample[]>,
): Promise<Map<string, Figures>> {
  const exact = createScorer(reference.runner, session);
  const scorers = new Map(candidates.map(({ engine }) => [engine, createScorer(engine.runner, session)]));
  const found = new Map(
    candidates.map(({ name }) => [name, { kl: 0, agreement: 0, perplexity: 0, byKind: {} } as Figures]),
  );
  for (const [kind, samples] of kinds) {
    const expected: SampleScores[] = [];
    const scores = new Map(candidates.map(({ name }): [string, SampleScores[]] => [name, []]));
    for (const sample of samples) {
      signal.throwIfAborted();
      const dense: Reference = await exact.reference(sample);
      expected.push(dense.scores);
      for (const { name, engine, mask } of candidates)
        scores.get(name)!.push(await scorers.get(engine)!.score(dense, mask));
    }
    const { perplexity } = figuresOf(addScores(expected));
    for (const [name, parts] of scores) {
      const own = figuresOf(addScores(parts));
      const figures = found.get(name)!;
      figures.kl += own.kl / kinds.size;
      figures.agreement += own.agreement / kinds.size;
      figures.perplexity += Math.log(own.perplexity / perplexity) / kinds.size;
      figures.byKind[kind] = {
        kl: round(own.kl, 4),
        agreement: round(own.agreement),
        perplexityTimes: round(own.perplexity / perplexity, 4),
      };
    }
    say(`${kind} is scored, ${addScores(expected).positions} positions`);
  }
  for (const figures of found.values()) figures.perplexity = Math.exp(figures.perplexity);
  return found;
}

const timeCandidates = (
  { rounds, signal }: QuantizationOptions,
  candidates: readonly Candidate[],
): Promise<Map<string, number>> =>
  interleaved(
    candidates.map(({ name, engine, mask }) => {
      const { decode } = engine.peer(name, mask);
      return { name, measure: () => decode(POSITION) };
    }),
    rounds,
    signal,
  );

/*
 * `bench ranks`: quality and time of surrogates by rank. For each rank the closed form is fitted on the same rows, and its
 * KL to the dense model is measured on held-out rows, under masks that skip the cheapest blocks. A token is timed with all
 * blocks skipped, with and without surrogates, in interleaved rounds, as a few surrogates take too little time to measure.
 * `gained_klPerMs` is for a quarter of the blocks.
 *
 * The limit: a rank r costs 2·hidden·r multiply-adds a block, and reads as many weights.
 */

const RANKS_SEED = 1;
const DENSE = 'dense';
const HOLES = 'holes';

type RanksOptions = {
  readonly home: string;
  readonly data: readonly string[];
  readonly ranks: readonly number[];
  readonly rounds: number;
  readonly threads: number;
  readonly say: (line: string) => void;
  readonly signal: AbortSignal;
};

export async function benchRanks(options: RanksOptions): Promise<object> {
  for (const rank of options.ranks) checkRank(rank);
  const scratch = await mkdtemp(join(tmpdir(), 'maskroute-ranks-'));
  const engines: Engine[] = [];
  try {
    const { folder } = await openInstalled(options.home, DEFAULT_MODEL);
    await cp(folder, join(modelsFolder(scratch), DEFAULT_MODEL), { recursive: true });
    const kls: number[] = [];
    for (const rank of options.ranks) {
      const fitted = await fitRank(options, scratch, rank);
      engines.push(fitted.engine);
      kls.push(fitted.kl);
      options.say(`rank ${rank}: held-out KL ${fitted.kl.toFixed(3)}`);
    }
    const found = await timeTokens(options, engines);
    return figures(options, kls, found, 2 * engines[0]!.manifest.config.layerCount);
  } finally {
    for (const { runner } of engines) await runner.close();
    await rm(scratch, { recursive: true, force: true });
  }
}

/** The engine stays open, and keeps its table, when the next rank's table is installed. */
async function fitRank(
  { home, data, threads, signal }: RanksOptions,
  scratch: string,
  rank: number,
): Promise<{ kl: number; engine: Engine }> {
  const out = join(scratch, `rank-${rank}.safetensors`);
  const model = await openInstalled(home, DEFAULT_MODEL);
  const { start } = await learnSurrogates({
    model,
    data: { files: data },
    start: { rank },
    distillation: { steps: 0 },
    seed: RANKS_SEED,
    out,
    threads,
    onProgress: () => undefined,
    log: () => undefined,
    signal,
  });
  await installSurrogates(scratch, DEFAULT_MODEL, out, { preset: false });
  return { kl: start, engine: await openEngine(scratch, DEFAULT_MODEL) };
}

/** ms a token: dense, with all blocks skipped, and with all blocks replaced by each engine's surrogates. */
async function timeTokens(
  { ranks, rounds, signal }: RanksOptions,
  engines: readonly Engine[],
): Promise<Map<string, number>> {
  const [first] = engines as readonly [Engine, ...Engine[]];
  const layers = Array.from({ length: first.manifest.config.layerCount }, (_, layer) => layer);
  const none = maskFromSkippedLayers(2 * layers.length, { skipAttention: layers, skipFfn: layers });
  const peers = [
    first.peer(DENSE, first.dense),
    first.peer(HOLES, none),
    ...engines.map(({ peer, runner }, index) =>
      peer(nameOf(ranks[index]!), withSurrogates(none, runner.surrogates)),
    ),
  ];
  return interleaved(
    peers.map(({ name, decode }) => ({ name, measure: () => decode(POSITION) })),
    rounds,
    signal,
  );
}

const nameOf = (rank: number): string => `rank ${rank}`;

function figures(
  { ranks, rounds, say }: RanksOptions,
  kls: readonly number[],
  found: Map<string, number>,
  blockCount: number,
) {
  for (const [name, ms] of found) say(`${name}: ${ms.toFixed(2)} ms/token`);
  const holes_ms = found.get(HOLES)!;
  const surrogates_ms = ranks.map((rank) => (found.get(nameOf(rank))! - holes_ms) / blockCount);
  const quarter = Math.round(blockCount / 4);
  return {
    bench: 'ranks',
    model: DEFAULT_MODEL,
    rounds,
    dense_ms: round(found.get(DENSE)!),
    allHoles_ms: round(holes_ms),
    ranks: ranks.map((rank, index) => ({
      rank,
      kl: round(kls[index]!),
      surrogate_us: round(1000 * surrogates_ms[index]!, 2),
      // From the previous rank to this one.
      gained_klPerMs:
        index === 0
          ? null
          : round(
              (kls[index - 1]! - kls[index]!) /
                (quarter * (surrogates_ms[index]! - surrogates_ms[index - 1]!)),
            ),
    })),
  };
}
