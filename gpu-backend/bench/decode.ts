/**
 * `bench decode` and `bench prefill`: milliseconds a token and a prompt, dense and with a quarter of the blocks
 * out, against llama.cpp on the same GGUF in the same run.
 *
 * The limit of decoding is the weights: each is read once a token, 1.16 bytes apiece at 8 bits with scales and
 * zero points. `speedup25Limit` is what the weights that a mask leaves out allow at most.
 */

import { withSurrogates } from '../../shared/mask.ts';
import { interleaved, round } from '../measure.ts';
import { DEFAULT_MODEL, defaultModelFile } from '../model/sources/default-model.ts';
import { weightsRead } from '../model/weights-read.ts';
import type { Peer } from './subjects.ts';
import { llamaCppPeer, openEngine, quarterMask } from './subjects.ts';

const DENSE = 'dense';
const QUARTER = '25 % of the blocks out';
const SURROGATES = '25 % replaced by surrogates';
const POSITIONS = [64, 512] as const;
const PROMPT_TOKENS = 512;
/** Bytes a weight: one, and a scale (4) and a zero point (1) for each 32. */
const BYTES_A_WEIGHT = 1 + 5 / 32;

export type SpeedOptions = {
  readonly home: string;
  readonly rounds: number;
  readonly say: (line: string) => void;
};

/** Opens the peers, calls `measure`, closes them. */
async function withPeers<T>(
  { home, say }: SpeedOptions,
  measure: (peers: Peer[], engine: Awaited<ReturnType<typeof openEngine>>) => Promise<T>,
): Promise<T> {
  const engine = await openEngine(home, DEFAULT_MODEL);
  const quarter = quarterMask(engine.manifest.config.layerCount);
  const { surrogates } = engine.runner;
  const own = [
    engine.peer(DENSE, engine.dense),
    engine.peer(QUARTER, quarter),
    ...(surrogates === undefined ? [] : [engine.peer(SURROGATES, withSurrogates(quarter, surrogates))]),
  ];
  const peers = [...own];
  for (const threads of [1, 2]) peers.push(await llamaCppPeer(defaultModelFile(home), threads));
  say(
    `${DEFAULT_MODEL} (${engine.manifest.weights}) against ${peers
      .slice(own.length)
      .map(({ name }) => name)
      .join(' and ')}`,
  );
  try {
    return await measure(peers, engine);
  } finally {
    for (const peer of peers) await peer.close();
    await engine.runner.close();
  }
}

export async function benchDecode(options: SpeedOptions): Promise<object> {
  return withPeers(options, async (peers, { manifest, dense }) => {
    const { config } = manifest;
    const quarter = quarterMask(config.layerCount);
    const limit = weightsRead(config, dense) / weightsRead(config, quarter);
    const bytes = weightsRead(config, dense) * BYTES_A_WEIGHT;
    const positions: Record<string, object> = {};
    for (const position of POSITIONS) {
      const subjects = peers.map((peer) => ({ name: peer.name, measure: () => peer.decode(position) }));
      const found = await interleaved(subjects, options.rounds);
      for (const [name, ms] of found)
        options.say(`after ${position} tokens, ${name}: ${ms.toFixed(2)} ms a token`);
      positions[`at${position}`] = decodeFigures(found, bytes);
    }
    return {
      bench: 'decode',
      model: manifest.name,
      rounds: options.rounds,
      ...positions,
      speedup25Limit: round(limit),
    };
  });
}

function decodeFigures(found: ReadonlyMap<string, number>, bytes: number): object {
  const dense_ms = found.get(DENSE)!;
  const quarter_ms = found.get(QUARTER)!;
  const replaced_ms = found.get(SURROGATES);
  const llamaCpp_ms = bestOfLlamaCpp(found);
  return {
    dense_ms: round(dense_ms),
    quarter_ms: round(quarter_ms),
    ...(replaced_ms === undefined ? {} : { quarterSurrogates_ms: round(replaced_ms) }),
    llamaCpp_ms: round(llamaCpp_ms),
    timesLlamaCpp: round(llamaCpp_ms / dense_ms),
    speedup25: round(dense_ms / quarter_ms),
    weightsRead_GBps: round(bytes / dense_ms / 1e6, 1),
  };
}

export async function benchPrefill(options: SpeedOptions): Promise<object> {
  return withPeers(options, async (peers, { manifest, dense }) => {
    const subjects = peers.map((peer) => ({ name: peer.name, measure: () => peer.prefill(PROMPT_TOKENS) }));
    const found = await interleaved(subjects, options.rounds);
    for (const [name, ms] of found) options.say(`${PROMPT_TOKENS} tokens, ${name}: ${ms.toFixed(0)} ms`);
    const dense_ms = found.get(DENSE)!;
    const llamaCpp_ms = bestOfLlamaCpp(found);
    const { config } = manifest;
    const products = (weightsRead(config, dense) - config.hiddenSize * config.vocabularySize) * PROMPT_TOKENS;
    return {
      bench: 'prefill',
      model: manifest.name,
      rounds: options.rounds,
      promptTokens: PROMPT_TOKENS,
      dense_ms: round(dense_ms, 1),
      quarter_ms: round(found.get(QUARTER)!, 1),
      llamaCpp_ms: round(llamaCpp_ms, 1),
      timesLlamaCpp: round(llamaCpp_ms / dense_ms),
      products_GMACps: round(products / dense_ms / 1e6, 1),
    };
  });
}

const bestOfLlamaCpp = (found: ReadonlyMap<string, number>): number =>
  Math.min(...[...found].filter(([name]) => name.startsWith('llama.cpp')).map(([, ms]) => ms));
