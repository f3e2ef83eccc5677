/** How a version goes live, as fields of a form: in which steps, and when the edge takes it back. */
import type { PublishBody } from '../../../shared/admin/publication-wire.ts';

/** The share of conversations that see the new version at each step on the way to everyone. */
const STEP_SHARES = [0.01, 0.1];

export const RolloutFields = () => (
  <>
    <label>
      <input name="gradual" type="checkbox" />
      Step by step: 1 %, 10 %, then every conversation
    </label>
    <label>
      Minutes a step
      <input name="minutes" type="number" min={1} max={1440} defaultValue="10" required />
    </label>
    <label>
      Roll back at an error rate above, % (empty: never)
      <input name="errors" type="number" min={0} max={99} step="any" />
    </label>
    <label>
      Roll back when ms/token is more than this many times that of the version before (empty: never)
      <input name="ratio" type="number" min={1.01} step="any" />
    </label>
  </>
);

export function rolloutIn(form: FormData): Pick<PublishBody, 'rollout' | 'auto_rollback'> {
  const errors = form.get('errors');
  const ratio = form.get('ratio');
  const duration_s = Math.round(60 * Number(form.get('minutes')));
  return {
    ...(form.get('gradual') === null ? {} : { rollout: STEP_SHARES.map((share) => ({ share, duration_s })) }),
    ...(errors === null && ratio === null
      ? {}
      : {
          auto_rollback: {
            ...(errors === null ? {} : { error_rate_max: Number(errors) / 100 }),
            ...(ratio === null ? {} : { tpot_ratio_max: Number(ratio) }),
          },
        }),
  };
}
