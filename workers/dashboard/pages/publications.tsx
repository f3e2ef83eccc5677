/** What was made live and when, with the way back; and what else could be made live. */

import { useState } from 'preact/hooks';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import {
  type LivePublication,
  livePublicationSchema,
  type MaskSetSummary,
  maskSetSummarySchema,
  type Publication,
  type PublishBody,
  publicationSchema,
} from '../../../shared/admin/publication-wire.ts';
import { admin, noneIfNotFound, query } from '../api.ts';
import { RowButton, timeIn } from '../components/controls.tsx';
import { Confirm, FormDialog } from '../components/dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useLoad, useScope } from '../hooks.ts';
import { percent, shortVersion, tenantName, when } from '../look.ts';

/** What the person is about to do. */
type Intent =
  | { readonly what: 'activate'; readonly set: MaskSetSummary }
  | { readonly what: 'rollback'; readonly live: LivePublication };

const REFRESH_ms = 15_000;

export function Publications() {
  const { tenant } = useScope();
  const [intent, setIntent] = useState<Intent>();
  const state = useLoad((signal) => loadState(tenant, signal), [tenant], REFRESH_ms);
  return (
    <Loaded load={state}>
      {({ live, history, sets }) => {
        const close = () => {
          setIntent(undefined);
          state.reload();
        };
        return (
          <>
            <div class="row spread">
              <p role="status">{statusOf(live, tenant)}</p>
              {live !== null && (
                <button
                  type="button"
                  class="secondary"
                  disabled={live.previous_version === null && live.share === 1}
                  onClick={() => setIntent({ what: 'rollback', live })}
                >
                  Roll back
                </button>
              )}
            </div>
            <Table
              caption="History"
              rows={history}
              rowKey={({ id }) => id}
              columns={[
                { title: 'When', cell: (row) => when(row.created_at) },
                { title: 'What', cell: (row) => row.action },
                {
                  title: 'Version',
                  cell: ({ version }) =>
                    version === null ? 'nothing' : <code title={version}>{shortVersion(version)}</code>,
                },
                {
                  title: 'Instead of',
                  cell: ({ replaced_version: old }) =>
                    old === null ? 'nothing' : <code title={old}>{shortVersion(old)}</code>,
                },
                { title: 'How', cell: howOf },
                { title: 'By', cell: (row) => <code>{row.actor}</code> },
              ]}
            />
            <MaskSets
              sets={sets}
              live={live?.version}
              onActivate={(set) => setIntent({ what: 'activate', set })}
            />
            {intent?.what === 'activate' && (
              <ActivateDialog set={intent.set} tenant={tenant} live={live?.version ?? null} onClose={close} />
            )}
            {intent?.what === 'rollback' && (
              <RollBackDialog live={intent.live} tenant={tenant} onClose={close} />
            )}
          </>
        );
      }}
    </Loaded>
  );
}

async function loadState(tenant: string, signal: AbortSignal) {
  const scope = query({ tenant });
  const [live, history, sets] = await Promise.all([
    admin(livePublicationSchema, `/publications/live${scope}`, { signal }).catch(noneIfNotFound),
    admin(listSchema(publicationSchema), `/publications${scope}`, { signal }),
    admin(listSchema(maskSetSummarySchema), `/mask-sets${scope}`, { signal }),
  ]);
  return { live, history: history.data, sets: sets.data };
}

function statusOf(live: LivePublication | null, tenant: string): string {
  const isDefault = tenant === '';
  if (live === null) {
    const instead = isDefault ? '' : ' Its requests use the default mask set.';
    return `Nothing is live for ${tenantName(tenant)}.${instead}`;
  }
  const { version, share, base_version: base, activate_at } = live;
  if (share === 1) return `Live for ${tenantName(tenant)}: ${version}, since ${when(activate_at)}.`;
  const without = isDefault ? 'the others run dense' : 'the others use the default mask set';
  const others = base === null ? without : `the others see ${base}`;
  return share === 0
    ? `${version} goes live at ${when(activate_at)} for ${tenantName(tenant)}; until then ${others}.`
    : `${version} is seen by ${percent(share)} of the conversations of ${tenantName(tenant)}; ${others}.`;
}

function howOf({ rollout, auto_rollback: bounds, reason }: Publication): string {
  const steps = rollout.map(({ share, duration_s }) => `${percent(share, 0)} for ${duration_s / 60} min`);
  const parts = [
    steps.length === 0 ? 'for everyone' : `${steps.join(', ')}, then everyone`,
    ...(bounds === null ? [] : ['watched']),
    ...(reason === null ? [] : [`because ${reason}`]),
  ];
  return parts.join('; ');
}

function MaskSets(props: {
  readonly sets: readonly MaskSetSummary[];
  readonly live: string | undefined;
  readonly onActivate: (set: MaskSetSummary) => void;
}) {
  return (
    <Table
      caption="Mask sets"
      empty="No mask set was uploaded: “maskroute publish FILE” does it."
      rows={props.sets}
      rowKey={({ version }) => version}
      columns={[
        { title: 'Version', cell: (set) => <code title={set.version}>{shortVersion(set.version)}</code> },
        { title: 'Name', cell: (set) => set.name },
        { title: 'Model', cell: (set) => set.model.name },
        { title: 'Clusters', cell: (set) => set.clusters, isNumber: true },
        { title: 'Blocks out', cell: (set) => percent(set.reached_sparsity), isNumber: true },
        { title: 'Uploaded', cell: (set) => when(set.created_at) },
        {
          title: 'Live',
          cell: (set) =>
            set.version === props.live ? (
              'live'
            ) : (
              <RowButton title="Activate" about={set.version} onClick={() => props.onActivate(set)} />
            ),
        },
      ]}
    />
  );
}

/*
 * Making a set live, at once or step by step, and taking it back. Both name what is live as this page saw it: when
 * somebody else was faster, the edge refuses and nothing changes.
 */

/** The share of conversations that see the new version at each step on the way to everyone. */
const STEP_SHARES = [0.01, 0.1];

function ActivateDialog(props: {
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
  const duration_s = Math.round(60 * Number(form.get('minutes')));
  return {
    ...(form.get('gradual') === null ? {} : { rollout: STEP_SHARES.map((share) => ({ share, duration_s })) }),
    ...timeIn(form, 'activate_at'),
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

function RollBackDialog(props: {
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
