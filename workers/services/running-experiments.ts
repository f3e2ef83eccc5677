/**
 * The started experiments, kept in the isolate with their mask sets decoded: assigning never waits for D1, and
 * an experiment is known only when every one of its variants could be served.
 */
import { z } from 'zod';
import { DENSE_VARIANT } from '../../shared/admin-experiments.ts';
import { type StoredExperiment, scopeOf } from '../db/experiments.ts';
import { EXPERIMENTS } from '../limits.ts';
import type { RunningExperiment } from './assign.ts';
import type { Hold } from './deadline.ts';
import { log, reasonOf } from './log.ts';
import type { HeldSets, RoutingTable } from './routing-table.ts';
import { createSwrCache, type SourceHealth } from './swr-cache.ts';

export interface RunningExperiments {
  /** Those that are started, and those that will start: their times are compared with the clock at each request. */
  list(hold: Hold): Promise<readonly RunningExperiment[]>;
  /** The same at once; undefined when it takes a question, to be asked by `list`. */
  fresh(): readonly RunningExperiment[] | undefined;
  /** Reads them now: after a start or stop the same isolate acts on it at once. */
  refresh(hold: Hold): Promise<void>;
}

const KEY = '';

export function createRunningExperiments(
  listStarted: () => Promise<readonly StoredExperiment[]>,
  table: Pick<RoutingTable, 'versionOf'>,
  health?: SourceHealth,
): RunningExperiments {
  const cache = createSwrCache<readonly RunningExperiment[]>(
    'the experiments',
    async () => {
      try {
        const held = (cache.peek(KEY) ?? []).flatMap(({ arms }) => arms.map(({ set }) => set));
        const running: RunningExperiment[] = [];
        for (const experiment of await listStarted()) {
          const known = await toRunning(experiment, table, held);
          if (known !== null) running.push(known);
        }
        return running;
      } catch (error) {
        log('error', 'experiments_load_failed', { reason: reasonOf(error) });
        throw error;
      }
    },
    EXPERIMENTS,
    health,
  );
  return {
    fresh: () => cache.fresh(KEY),
    // While nothing is known of them, requests are served what is live.
    list: async (hold) => (await cache.get(KEY, hold).catch(() => null)) ?? [],
    async refresh(hold) {
      await cache.refresh(KEY, hold);
    },
  };
}

/**
 * Null for one whose set cannot be read: it must not take the others with it. Sets are read one after the other, since
 * the text of one has up to 2 MB and takes several times that while it is decoded.
 */
async function toRunning(
  experiment: StoredExperiment,
  table: Pick<RoutingTable, 'versionOf'>,
  held: HeldSets,
): Promise<RunningExperiment | null> {
  const { id, owner, definition } = experiment;
  try {
    const arms: RunningExperiment['arms'][number][] = [];
    for (const { name, weight, mask_set } of definition.variants) {
      const set = mask_set === DENSE_VARIANT ? null : await table.versionOf(owner, mask_set, held);
      arms.push({ name, weight, set });
    }
    const { sticky, shadow_share: shadowShare } = definition;
    return { id, owner, scope: scopeOf(experiment), sticky, arms, shadowShare };
  } catch (error) {
    if (!(error instanceof z.ZodError) && !(error instanceof SyntaxError)) throw error;
    log('error', 'experiment_unusable', { experiment: id, reason: reasonOf(error) });
    return null;
  }
}
