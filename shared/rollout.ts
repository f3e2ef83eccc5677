/**
 * Which version of two a request sees while a publication takes hold: pure arithmetic on the schedule that is
 * stored with the publication, so that every isolate agrees with every other, and none has to be told when a
 * step begins. A request asks once and keeps the answer: it sees the old version or the new one.
 */
import { stickyFraction } from './experiment.ts';

/** `share` of the sticky keys see the new version for `duration_s`; then the next step, at last all of them. */
export type RolloutStep = { readonly share: number; readonly duration_s: number };

export type Rollout = {
  /** Salts the hash, so that it is not the same keys that go first in every publication. */
  readonly id: string;
  readonly activateAt_ms: number;
  /** Shares rise; none: everyone at once. */
  readonly steps: readonly RolloutStep[];
};

export const completesAt_ms = ({ activateAt_ms, steps }: Rollout): number =>
  steps.reduce((end_ms, step) => end_ms + step.duration_s * 1000, activateAt_ms);

/** The share of sticky keys that see the new version, 0 to 1. It never falls as time goes on. */
export function shareAt({ activateAt_ms, steps }: Rollout, now_ms: number): number {
  if (now_ms < activateAt_ms) return 0;
  let end_ms = activateAt_ms;
  for (const step of steps) {
    end_ms += step.duration_s * 1000;
    if (now_ms < end_ms) return step.share;
  }
  return 1;
}

/** Whether this sticky key sees the new version. Once it does, it goes on to: shares only rise. */
export function seesNew(rollout: Rollout, stickyKey: string, now_ms: number): boolean {
  const share = shareAt(rollout, now_ms);
  if (share === 0 || share === 1) return share === 1;
  return stickyFraction(rollout.id, stickyKey) < share;
}
