/** What was made live and when, with the way back; and what else could be made live. */
import { useState } from 'preact/hooks';
import {
  type LivePublication,
  listSchema,
  livePublicationSchema,
  type MaskSetSummary,
  maskSetSummarySchema,
  type Publication,
  publicationSchema,
} from '../../../shared/admin.ts';
import { ApiError, admin, query } from '../api.ts';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { percent, shortVersion, tenantName, when } from '../format.ts';
import { ActivateDialog, RollBackDialog } from '../publications/dialogs.tsx';
import { useLoad } from '../use-load.ts';

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
              {live !== undefined && (
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

function noneIfNotFound(error: unknown): undefined {
  if (error instanceof ApiError && error.status === 404) return undefined;
  throw error;
}

function statusOf(live: LivePublication | undefined, tenant: string): string {
  const isDefault = tenant === '';
  if (live === undefined) {
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
              <button type="button" class="small outline" onClick={() => props.onActivate(set)}>
                Activate <span class="hidden">{set.version}</span>
              </button>
            ),
        },
      ]}
    />
  );
}
