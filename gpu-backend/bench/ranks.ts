/**
 * `bench ranks`: what a rank of surrogates gives and what it takes. For each rank the closed form is fitted on the same
 * rows, and its KL to the dense model is measured on held-out rows under masks of the cheapest blocks. A token is timed
 * with every block replaced, against holes, in interleaved rounds: a few surrogates take too little time to be seen.
 * What a rank gives for its time is told for a quarter of the blocks.
 *
 * The limit: a rank r costs 2·hidden·r multiply-adds a block, and reads as many weights.
 */
import { cp, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { maskFromSkippedLayers, type SurrogatesId, withSurrogates } from '../../shared/mask/mask.ts';
import { learnSurrogates } from '../learning/surrogates/learn-surrogates.ts';
import { interleaved, rested, round } from '../measure.ts';
import { installSurrogates } from '../model/install-surrogates.ts';
import { DEFAULT_MODEL } from '../model/sources/default-model.ts';
import { modelsFolder, openInstalled } from '../model/store.ts';
import { checkRank } from '../model/surrogates.ts';
import { openEngine } from './decode.ts';

const POSITION = 64;
const SEED = 1;
const REST_ms = 200;
const DENSE = 'dense';
const HOLES = 'holes';

export type RanksOptions = {
  readonly home: string;
  readonly data: readonly string[];
  readonly ranks: readonly number[];
  readonly rounds: number;
  readonly threads: number;
  readonly say: (line: string) => void;
  readonly signal: AbortSignal;
};

type Engine = Awaited<ReturnType<typeof openEngine>>;

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

/** The engine keeps what it has opened when the next rank's table takes the place of this one. */
async function fitRank(
  { home, data, threads, signal }: RanksOptions,
  scratch: string,
  rank: number,
): Promise<{ kl: number; engine: Engine }> {
  const out = join(scratch, `rank-${rank}.safetensors`);
  const model = await openInstalled(home, DEFAULT_MODEL);
  const { start } = await learnSurrogates({
    ...{ model, data, rank, out, threads, signal, steps: 0, seed: SEED },
    onProgress: () => undefined,
  });
  await installSurrogates(scratch, DEFAULT_MODEL, out, { preset: false });
  return { kl: start, engine: await openEngine(scratch, DEFAULT_MODEL) };
}

/** ms a token: dense, with a hole in every block's place, and with each engine's surrogates there. */
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
      peer(nameOf(ranks[index]!), withSurrogates(none, runner.surrogates as SurrogatesId)),
    ),
  ];
  const subjects = peers.map(({ name, decode }) => ({
    name,
    measure: () => {
      signal.throwIfAborted();
      return decode(POSITION);
    },
  }));
  return interleaved(
    subjects.map((subject) => rested(subject, REST_ms)),
    rounds,
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
      // Of the step from the rank before.
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
