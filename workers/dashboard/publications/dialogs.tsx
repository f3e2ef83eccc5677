/**
 * Making a set live, at once or step by step, and taking it back. Both name what is live as this page saw it: when
 * somebody else was faster, the edge refuses and nothing changes.
 */
import {
  type LivePublication,
  type MaskSetSummary,
  type PublishBody,
  publicationSchema,
} from '../../../shared/admin.ts';
import { admin } from '../api.ts';
import { Confirm } from '../components/dialog.tsx';
import { FormDialog } from '../components/form-dialog.tsx';
import { tenantName } from '../format.ts';

/** The share of conversations that see the new version at each step on the way to everyone. */
const STEP_SHARES = [0.01, 0.1];

export function ActivateDialog(props: {
  readonly set: MaskSetSummary;
  readonly tenant: string;
  readonly live: string | null;
  readonly onClose: () => void;
}) {
  const { set, tenant, live, onClose } = props;
  return (
    <FormDialog
      title="Make this mask set live?"
      action="Activate"
      onClose={onClose}
      onSubmit={async (form) => {
        const body: PublishBody = {
          version: set.version,
          tenant,
          expected_version: live,
          ...scheduleOf(form),
        };
        await admin(publicationSchema, '/publications', { method: 'POST', body });
        onClose();
      }}
    >
      <p>
        {set.name} ({set.version}) for {tenantName(tenant)}. Every part of the edge knows it within five
        seconds.
      </p>
      <label>
        <input name="gradual" type="checkbox" />
        Step by step: 1 %, 10 %, then every conversation
      </label>
      <label>
        Minutes a step
        <input name="minutes" type="number" min={1} max={1440} defaultValue="10" required />
      </label>
      <label>
        Not before (empty: now)
        <input name="activate_at" type="datetime-local" />
      </label>
      <label>
        Take it back when more than this share of requests fails, % (empty: never)
        <input name="errors" type="number" min={0} max={99} step="any" />
      </label>
      <label>
        Take it back when a token takes more than this many times what it took before (empty: never)
        <input name="ratio" type="number" min={1.01} step="any" />
      </label>
    </FormDialog>
  );
}

function scheduleOf(form: FormData): Partial<PublishBody> {
  const errors = form.get('errors');
  const ratio = form.get('ratio');
  const at = form.get('activate_at');
  const duration_s = Math.round(60 * Number(form.get('minutes')));
  return {
    ...(form.get('gradual') === null ? {} : { rollout: STEP_SHARES.map((share) => ({ share, duration_s })) }),
    ...(at === null ? {} : { activate_at: new Date(String(at)).toISOString() }),
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

export function RollBackDialog(props: {
  readonly live: LivePublication;
  readonly tenant: string;
  readonly onClose: () => void;
}) {
  const { live, tenant, onClose } = props;
  return (
    <Confirm
      title="Roll back?"
      action="Roll back"
      onClose={onClose}
      act={async () => {
        const body = { tenant, expected_version: live.version };
        await admin(publicationSchema, '/publications/rollback', { method: 'POST', body });
      }}
    >
      <p>
        {live.version} goes, {live.previous_version ?? whatIsLeft(tenant)} comes back for {tenantName(tenant)}
        .
      </p>
    </Confirm>
  );
}

/** After a first publication that was called off. */
const whatIsLeft = (tenant: string): string => (tenant === '' ? 'the dense model' : 'the default mask set');
