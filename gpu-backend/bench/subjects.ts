/** What the speed benches compare: our engine under a mask, and llama.cpp on the same GGUF. */
import { availableParallelism } from 'node:os';
import { denseMask, type Mask, maskFromSkippedLayers, type SurrogatesId } from '../../shared/mask.ts';
import type { Runner } from '../engine/runner.ts';
import { openRunner } from '../engine/runner.ts';
import { median } from '../measure.ts';
import { openInstalled } from '../model/store.ts';

/** Chunks of a prompt, as the server computes them. */
const CHUNK_TOKENS = 128;
/** Steps whose median is one figure. */
const STEPS = 24;

export type Peer = {
  readonly name: string;
  /** ms a token, greedy, after `position` tokens. */
  decode(position: number): Promise<number>;
  /** ms for a prompt of `tokens`. */
  prefill(tokens: number): Promise<number>;
  close(): Promise<void>;
};

const somePrompt = (tokens: number, vocabulary: number): number[] =>
  Array.from({ length: tokens }, (_, i) => 100 + ((i * 7919) % (vocabulary - 1000)));

/** Our engine, one session, on all cores; `peers` share it. */
export async function openEngine(home: string, model: string) {
  const { folder, manifest } = await openInstalled(home, model);
  const runner = await openRunner(folder, manifest.config, {
    threads: availableParallelism(),
    surrogates: manifest.surrogates?.id as SurrogatesId | undefined,
  });
  return {
    manifest,
    runner,
    peer: (name: string, mask: Mask): Peer => enginePeer(runner, name, mask),
    dense: denseMask(2 * manifest.config.layerCount),
  };
}

function enginePeer(runner: Runner, name: string, mask: Mask): Peer {
  const plan = { mask, kv: 'preserve' } as const;
  const { vocabularySize } = runner.config;
  const prefill = async (tokens: number) => {
    const cache = runner.newCache();
    const ids = somePrompt(tokens, vocabularySize);
    const start = performance.now();
    for (let at = 0; at < tokens; at += CHUNK_TOKENS) {
      const tokenIds = ids.slice(at, at + CHUNK_TOKENS);
      const last = at + CHUNK_TOKENS >= tokens;
      await runner.run({ cache, tokenIds, plan, logitRows: last ? [tokenIds.length - 1] : [] });
    }
    return { cache, elapsed_ms: performance.now() - start };
  };
  return {
    name,
    async decode(position) {
      const { cache } = await prefill(position);
      const times: number[] = [];
      for (let step = 0; step < STEPS; step++) {
        const start = performance.now();
        await runner.run({ cache, tokenIds: [100 + step], plan, logitRows: [0] });
        times.push(performance.now() - start);
      }
      return median(times);
    },
    prefill: async (tokens) => (await prefill(tokens)).elapsed_ms,
    close: async () => {},
  };
}

/** llama.cpp through node-llama-cpp, from the GGUF that our model was imported from. */
export async function llamaCppPeer(ggufFile: string, threads: number): Promise<Peer> {
  const { getLlama } = await import('node-llama-cpp');
  const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads });
  const model = await llama.loadModel({ modelPath: ggufFile });
  const context = await model.createContext({ contextSize: 1024, batchSize: 512, threads });
  const sequence = context.getSequence();
  const prompt = (tokens: number) => somePrompt(tokens, 49152) as never[];
  return {
    name: `llama.cpp, ${threads} threads`,
    async decode(position) {
      await sequence.clearHistory();
      await sequence.evaluateWithoutGeneratingNewTokens(prompt(position));
      const times: number[] = [];
      let last = performance.now();
      for await (const _ of sequence.evaluate(prompt(1), { temperature: 0 })) {
        times.push(performance.now() - last);
        last = performance.now();
        if (times.length > STEPS) break;
      }
      // The first counts the start of the generator.
      return median(times.slice(1));
    },
    async prefill(tokens) {
      await sequence.clearHistory();
      const start = performance.now();
      await sequence.evaluateWithoutGeneratingNewTokens(prompt(tokens));
      return performance.now() - start;
    },
    close: () => llama.dispose(),
  };
}

/** A quarter of SmolLM2's blocks, 7 attention and 8 FFN, spread over the layers; the same share of other models. */
export function quarterMask(layerCount: number): Mask {
  const spread = (count: number, offset: number) =>
    Array.from({ length: count }, (_, i) =>
      Math.min(layerCount - 1, offset + Math.floor((i * (layerCount - 4)) / count)),
    );
  const skipped = Math.round(layerCount / 2);
  const attention = Math.floor(skipped / 2);
  return maskFromSkippedLayers(2 * layerCount, {
    skipAttention: spread(attention, 3),
    skipFfn: spread(skipped - attention, 2),
  });
}
