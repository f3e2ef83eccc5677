/** Computes units, one at a time, with the model's sessions. */
import { LRUCache } from 'lru-cache';
import { isDense, maskFromBits, withSurrogates } from '../../../shared/mask/mask.ts';
import { oneAtATime } from '../../one-at-a-time.ts';
import { type GateBatch, nextTokenTargets, type SampleBatch } from '../gates/batches.ts';
import { contentKey } from '../journal.ts';
import { type Reference, type SampleScores, SCORE_FIGURES } from '../search/score-masks.ts';
import type { BatchUnit, ScoreUnit, Unit } from './unit.ts';
import { createUnitSessions } from './unit-sessions.ts';
import type { OpenUnits, UnitsOptions } from './units.ts';

type UnitComputer = AsyncDisposable & {
  /** Computes the unit after all units requested before it. Rejects when `signal` aborts before it begins. */
  run(unit: Unit, signal?: AbortSignal): Promise<number[]>;
};

/** Cache of the dense model's targets, for further units on the same batches: some 300 batches of `learn`. */
const TAUGHT_BYTES_MAX = 128 * 1024 * 1024;

export function openUnitComputer(options: Omit<UnitsOptions, 'signal'>): UnitComputer {
  const { model, surrogates } = options;
  const { config } = model.manifest;
  const sessions = createUnitSessions(options);

  const taughtBatches = new LRUCache<string, GateBatch>({
    maxSize: TAUGHT_BYTES_MAX,
    sizeCalculation: ({ targetIds }) => 8 * targetIds.length,
  });
  const taught = async ({ targets, batch }: BatchUnit): Promise<GateBatch> => {
    const typed = typedBatch(batch);
    if (targets === 'next-token') return nextTokenTargets(typed);
    const key = contentKey(batch);
    const found = taughtBatches.get(key) ?? (await sessions.teach(typed));
    taughtBatches.set(key, found);
    return found;
  };

  let reference: { readonly key: string; readonly found: Reference } | undefined;
  const scores = async (unit: ScoreUnit): Promise<SampleScores[]> => {
    const key = contentKey([unit.scoreFrom, unit.tokenIds]);
    if (reference?.key !== key) {
      const sample = { tokenIds: Int32Array.from(unit.tokenIds), scoreFrom: unit.scoreFrom };
      reference = { key, found: await (await sessions.scorer()).reference(sample) };
    }
    const { found } = reference;
    const all: SampleScores[] = [];
    for (const bits of unit.masks) {
      const mask = maskFromBits(2 * config.layerCount, bits);
      const own = withSurrogates(mask, surrogates?.id);
      all.push(isDense(mask) ? found.scores : await (await sessions.scorer()).score(found, own));
    }
    return all;
  };

  const compute = async (unit: Unit): Promise<number[]> => {
    switch (unit.kind) {
      case 'loss':
        return [await sessions.loss(unit.targets, await taught(unit), unit.gates)];
      case 'step': {
        const { loss, gradients } = await sessions.step(unit.targets, await taught(unit), unit.gates);
        return [loss, ...gradients];
      }
      case 'score':
        return (await scores(unit)).flatMap((one) => SCORE_FIGURES.map((figure) => one[figure]));
    }
  };

  const inTurn = oneAtATime();
  let isClosed = false;
  return {
    run: (unit, signal) =>
      inTurn(() => {
        signal?.throwIfAborted();
        if (isClosed) throw new Error('the sessions are closed');
        return compute(unit);
      }),
    async [Symbol.asyncDispose]() {
      isClosed = true;
      await inTurn(() => {});
      await sessions.close();
    },
  };
}

/** Computes units in this process. */
export const openLocalUnits: OpenUnits = async ({ signal, ...options }) => {
  const computer = openUnitComputer(options);
  return {
    atOnce: 1,
    run: (unit) => computer.run(unit, signal),
    [Symbol.asyncDispose]: () => computer[Symbol.asyncDispose](),
  };
};

const typedBatch = ({ tokenIds, sequences, scoredRows, nextIds }: BatchUnit['batch']): SampleBatch => ({
  tokenIds: Int32Array.from(tokenIds),
  sequences,
  scoredRows: Int32Array.from(scoredRows),
  nextIds: Int32Array.from(nextIds),
});
