/**
 * Which variant of which experiment a request takes part in: by hash and never by coin, so that the same
 * sticky key gets the same variant everywhere and always. Experiments do not overlap, so at most one is found.
 */
import { assignVariant, isInScope, type Place, type Scope } from '../../shared/experiment.ts';
import { type StickyCaller, type StickyKind, type StickySource, stickyKey } from '../../shared/sticky-key.ts';
import type { LiveSet } from './routing-table.ts';

/** What the variant serves: `set` null runs every block. */
export type Arm = { readonly name: string; readonly weight: number; readonly set: LiveSet | null };

export type RunningExperiment = {
  readonly id: string;
  /** Whose it is: ids are their owners' own. */
  readonly owner: string;
  readonly scope: Scope;
  readonly sticky: StickyKind;
  readonly arms: readonly Arm[];
  /** The share of its requests to compare with the dense model. */
  readonly shadowShare: number;
};

export type Assignment = {
  readonly experiment: string;
  readonly experimentOwner: string;
  readonly variant: string;
  readonly region: string;
  /** Null: in no experiment, so what is live counts. */
  readonly arm: Arm | null;
  readonly shadowShare: number;
};

export const NO_EXPERIMENT = 'none';
export const LIVE_VARIANT = 'live';

export const unassigned = (region: string): Assignment => ({
  experiment: NO_EXPERIMENT,
  experimentOwner: '',
  variant: LIVE_VARIANT,
  region,
  arm: null,
  shadowShare: 0,
});

export type AssignRequest = {
  readonly caller: StickyCaller;
  /** Without the suffix that asks for dense. */
  readonly model: string;
  readonly place: Place;
  readonly region: string;
  readonly source: StickySource;
  /** Whether a mask set holds for the model that is asked for. */
  readonly isUsable: (set: LiveSet) => boolean;
};

/**
 * A request takes part only if every arm could serve it: one that is turned away from some arms and not from
 * others would make the arms' requests different in kind.
 */
export function assign(
  experiments: readonly RunningExperiment[],
  { caller, model, place, region, source, isUsable }: AssignRequest,
  now_ms: number,
): Assignment {
  const experiment = experiments.find(
    ({ scope, arms }) =>
      isInScope(scope, { tenant: caller.tenant, model, place }, now_ms) &&
      arms.every(({ set }) => set === null || isUsable(set)),
  );
  if (experiment === undefined) return unassigned(region);
  const { id, owner, sticky, arms, shadowShare } = experiment;
  const arm = assignVariant(id, arms, stickyKey(sticky, caller, source));
  return { experiment: id, experimentOwner: owner, variant: arm.name, region, arm, shadowShare };
}
