/**
 * The model's sessions that compute units. If memory has room, all sessions stay open once used; else the model is
 * computed layer by layer, and closed while the serving engine scores masks.
 */
import { toInstalledBasis } from '../../model/surrogates.ts';
import type { GateBatch, TextBatch } from '../gates/batches.ts';
import { type GateStep, openGateSession, openLossSession } from '../gates/gate-session.ts';
import { openLayeredSession } from '../gates/layered-session.ts';
import { type MemoryPlan, planMemory } from '../gates/step-memory.ts';
import { openTeacher, type TaughtBatch } from '../gates/teacher.ts';
import type { TargetKind } from '../search/effort.ts';
import { openScoring, type Scorer, type Scoring } from '../search/score-masks.ts';
import type { UnitsOptions } from './units.ts';

type UnitSessions = {
  loss(targets: TargetKind, batch: GateBatch, gates: ArrayLike<number>): Promise<number>;
  step(targets: TargetKind, batch: GateBatch, gates: ArrayLike<number>): Promise<GateStep>;
  teach(text: TextBatch): Promise<TaughtBatch>;
  scorer(): Promise<Scorer>;
  close(): Promise<void>;
};

type Options = Omit<UnitsOptions, 'signal'>;

/** Each session is opened when it is first asked for. */
export function createUnitSessions(options: Options): UnitSessions {
  const { config, weights } = options.model.manifest;
  const plan = planMemory(config, weights, options.memory_bytes ?? process.availableMemory());
  return plan.kind === 'whole' ? wholeSessions(options) : layeredSessions(options, plan);
}

type Closable = { close(): Promise<void> };

/**
 * With the dense model's most likely tokens alone, masks that push the probability of all others towards 0 would look
 * good.
 */
const hasTail = (targets: TargetKind): boolean => targets === 'dense';

const tableOf = ({ surrogates, model }: Options) =>
  surrogates && toInstalledBasis(surrogates.table, model.manifest);

function wholeSessions(options: Options): UnitSessions {
  const { model, threads, rounding } = options;
  const { folder, manifest } = model;
  const { config } = manifest;
  const sessions = new AsyncDisposableStack();
  const onDemand = <T extends Closable>(open: () => Promise<T>): (() => Promise<T>) => {
    let opening: Promise<T> | undefined;
    return () => {
      opening ??= open().then(
        (part) => {
          sessions.defer(() => part.close());
          return part;
        },
        (error: unknown) => {
          // Memory or disk may be free again when the next unit needs it.
          opening = undefined;
          throw error;
        },
      );
      return opening;
    };
  };
  const surrogates = tableOf(options);
  const byTargets = <T extends Closable>(open: (tail: boolean) => Promise<T>) => ({
    dense: onDemand(() => open(hasTail('dense'))),
    'next-token': onDemand(() => open(hasTail('next-token'))),
  });
  const losses = byTargets((tail) =>
    openLossSession(folder, config, { threads, rounding, surrogates, tail }),
  );
  const gates = byTargets((tail) => openGateSession(folder, config, { threads, rounding, surrogates, tail }));
  const teacher = onDemand(() => openTeacher(folder, config, { threads, rounding }));
  const scoring = onDemand(() => scoringOf(options));
  return {
    loss: async (targets, batch, open) => (await losses[targets]()).loss(batch, open),
    step: async (targets, batch, open) => (await gates[targets]()).step(batch, open),
    teach: async (text) => (await teacher()).teach(text),
    scorer: async () => (await scoring()).scorer,
    close: () => sessions.disposeAsync(),
  };
}

/** Keeps one kind of session open at a time. */
function layeredSessions(options: Options, { layersKept }: MemoryPlan): UnitSessions {
  const { model, threads, rounding } = options;
  const { folder, manifest } = model;
  const surrogates = tableOf(options);
  let current: { readonly key: string; readonly opened: Closable } | undefined;
  const only = async <T extends Closable>(key: string, open: () => Promise<T>): Promise<T> => {
    if (current?.key !== key) {
      await current?.opened.close();
      current = undefined;
      current = { key, opened: await open() };
    }
    return current.opened as T;
  };
  const layers = (tail: boolean) =>
    only(`layers ${tail}`, () =>
      openLayeredSession(folder, manifest.config, { threads, rounding, surrogates, tail, layersKept }),
    );
  return {
    loss: async (targets, batch, gates) => (await layers(hasTail(targets))).loss(batch, gates),
    step: async (targets, batch, gates) => (await layers(hasTail(targets))).step(batch, gates),
    teach: async (text) => (await layers(true)).teach(text),
    scorer: async () => (await only('scoring', () => scoringOf(options))).scorer,
    async close() {
      await current?.opened.close();
      current = undefined;
    },
  };
}

const scoringOf = ({ model, threads, device, surrogates }: Options): Promise<Scoring> =>
  openScoring(model, { threads, device, surrogates: surrogates?.id });
