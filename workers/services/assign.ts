/**
 * Which variant of which experiment a request takes part in. No experiment can be defined yet, so every
 * request is in the implicit one, whose only variant is what is live.
 */

export type Assignment = { readonly experiment: string; readonly variant: string; readonly region: string };

export const NO_EXPERIMENT = 'none';
export const LIVE_VARIANT = 'live';

export const assign = (region: string): Assignment => ({
  experiment: NO_EXPERIMENT,
  variant: LIVE_VARIANT,
  region,
});
