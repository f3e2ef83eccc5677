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
import type { RoutingTable } from './routing-table.ts';
import { createSwrCache } from './swr-cache.ts';

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
): RunningExperiments {
  const cache = createSwrCache<readonly RunningExperiment[]>(
    'the experiments',
    async () => {
      try {
        const started = await listStarted();
        const running = await Promise.all(started.map((experiment) => toRunning(experiment, table)));
        return running.filter((experiment) => experiment !== null);
      } catch (error) {
        log('error', 'experiments_load_failed', { reason: reasonOf(error) });
        throw error;
      }
    },
    EXPERIMENTS,
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

/** Null for one whose set cannot be read: it must not take the others with it. */
async function toRunning(
  experiment: StoredExperiment,
  table: Pick<RoutingTable, 'versionOf'>,
): Promise<RunningExperiment | null> {
  const { id, owner, definition } = experiment;
  try {
    const arms = await Promise.all(
      definition.variants.map(async ({ name, weight, mask_set }) => ({
        name,
        weight,
        set: mask_set === DENSE_VARIANT ? null : await table.versionOf(owner, mask_set),
      })),
    );
    const { sticky, shadow_share: shadowShare } = definition;
    return { id, scope: scopeOf(experiment), sticky, arms, shadowShare };
  } catch (error) {
    if (!(error instanceof z.ZodError) && !(error instanceof SyntaxError)) throw error;
    log('error', 'experiment_unusable', { experiment: id, reason: reasonOf(error) });
    return null;
  }
}
