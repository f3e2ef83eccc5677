/** The orders of all static methods on the same calibration samples, with every model evaluation kept on disk. */
import { z } from 'zod';
import type { Mask, SurrogatesId } from '../../../../shared/mask/mask.ts';
import { maskId, withSurrogates } from '../../../../shared/mask/mask.ts';
import type { Sample } from '../../data/samples.ts';
import { type Journal, sampleKey } from '../../journal.ts';
import type { Reference, Scorer } from '../../search/score-masks.ts';
import { addScores } from '../../search/score-masks.ts';
import type { StaticMethod } from '../result.ts';
import { type Evaluated, openKeptAnswers } from '../score-rows.ts';
import type { Similarities } from './similarity.ts';
import { measureSimilarities } from './similarity.ts';
import type { Removal, SearchCosts } from './static-orders.ts';
import { staticOrders } from './static-orders.ts';

/** The model that is searched. `scorer` scores its masks on `samples`, the calibration text. */
type Calibrated = {
  readonly evaluated: Evaluated;
  readonly scorer: Scorer;
  readonly samples: readonly Sample[];
};

type WantedOrders = {
  readonly methods: readonly StaticMethod[];
  /** Orders are searched once with holes and once with each table of surrogates, as their masks will be served. */
  readonly flavours: readonly (SurrogatesId | null)[];
  readonly skipCountMax: number;
  readonly evaluationsMax: number;
};

type SearchHooks = {
  readonly onEvaluation: (method: StaticMethod) => void;
  readonly signal?: AbortSignal | undefined;
};

/** Orders by method, for one flavour. */
export type Orders = ReadonlyMap<StaticMethod, readonly Removal[]>;

const journalSchema = z.union([
  z.strictObject({ kl: z.number(), loss: z.number() }),
  z.strictObject({ blocks: z.array(z.number()), layers: z.array(z.number()) }),
]);
type Entry = z.infer<typeof journalSchema>;

/** Orders by flavour. Rejects when `signal` aborts; finished evaluations stay on disk. */
export async function searchOrders(
  calibrated: Calibrated,
  { methods, flavours, skipCountMax, evaluationsMax }: WantedOrders,
  { onEvaluation, signal }: SearchHooks,
): Promise<Map<SurrogatesId | null, Orders>> {
  const { evaluated, samples } = calibrated;
  const question = { kind: 'search', samples: sampleKey(samples) };
  const journal = await openKeptAnswers<Entry>(evaluated, question, journalSchema);
  const evaluate = createEvaluator(calibrated, journal);
  const similarities = once(() => loadSimilarities(calibrated, journal, signal));
  const found = new Map<SurrogatesId | null, Orders>();
  for (const flavour of flavours) {
    const orders = new Map<StaticMethod, readonly Removal[]>();
    for (const method of methods) {
      const removals = await staticOrders(method, {
        layerCount: evaluated.model.manifest.config.layerCount,
        skipCountMax,
        evaluationsMax,
        similarities,
        costs: (mask) => evaluate(withSurrogates(mask, flavour)),
        onEvaluation: () => onEvaluation(method),
        signal,
      });
      orders.set(method, removals);
    }
    found.set(flavour, orders);
  }
  return found;
}

function createEvaluator(
  { evaluated, samples, scorer }: Calibrated,
  journal: Journal<Entry>,
): (mask: Mask) => Promise<SearchCosts> {
  const references = once(async () => {
    const all: Reference[] = [];
    for (const sample of samples) all.push(await scorer.reference(sample));
    return all;
  });
  return async (mask) => {
    const name = maskId(evaluated.model.manifest.hash, mask);
    const known = journal.get(name);
    if (known !== undefined && 'kl' in known) return known;
    const scores = [];
    for (const reference of await references()) scores.push(await scorer.score(reference, mask));
    const { positions, kl, loss } = addScores(scores);
    const costs = { kl: kl / positions, loss: loss / positions };
    await journal.set(name, costs);
    return costs;
  };
}

async function loadSimilarities(
  { evaluated: { model, threads }, samples }: Calibrated,
  journal: Journal<Entry>,
  signal: AbortSignal | undefined,
): Promise<Similarities> {
  const known = journal.get('similarities');
  if (known !== undefined && 'blocks' in known) return known;
  const sequences = samples.map(({ tokenIds }) => tokenIds);
  const found = await measureSimilarities(model, sequences, threads, signal);
  await journal.set('similarities', { blocks: [...found.blocks], layers: [...found.layers] });
  return found;
}

function once<T>(make: () => Promise<T>): () => Promise<T> {
  let made: Promise<T> | undefined;
  return () => {
    made ??= make();
    return made;
  };
}
