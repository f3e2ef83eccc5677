/** What was made live and when, with the way back; and what else could be made live. */
import { useState } from 'preact/hooks';
import {
  listSchema,
  type MaskSetSummary,
  maskSetSummarySchema,
  type Publication,
  publicationSchema,
} from '../../../shared/admin.ts';
import { admin, query } from '../api.ts';
import { Confirm } from '../components/dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { percent, shortVersion, tenantName, when } from '../format.ts';
import { useLoad } from '../use-load.ts';

/** What the person is about to do. */
type Intent =
  | { readonly what: 'activate'; readonly set: MaskSetSummary }
  | { readonly what: 'rollback'; readonly live: Publication };

const REFRESH_ms = 15_000;

export function Publications() {
  const { tenant } = useScope();
  const [intent, setIntent] = useState<Intent>();
  const state = useLoad((signal) => loadState(tenant, signal), [tenant], REFRESH_ms);
  return (
    <Loaded load={state}>
      {({ history, sets }) => {
        const live = history[0];
        return (
          <>
            <div class="row spread">
              <p role="status">
                {live === undefined
                  ? `Nothing was published for ${tenantName(tenant)}.`
                  : `Live for ${tenantName(tenant)}: ${live.version}, since ${when(live.created_at)}.`}
              </p>
              {live !== undefined && (
                <button
                  type="button"
                  class="secondary"
                  disabled={live.replaced_version === null}
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
                  cell: (row) => <code title={row.version}>{shortVersion(row.version)}</code>,
                },
                {
                  title: 'Instead of',
                  cell: ({ replaced_version: old }) =>
                    old === null ? 'nothing' : <code title={old}>{shortVersion(old)}</code>,
                },
                { title: 'By', cell: (row) => <code>{row.actor}</code> },
              ]}
            />
            <MaskSets
              sets={sets}
              live={live?.version}
              onActivate={(set) => setIntent({ what: 'activate', set })}
            />
            {intent !== undefined && (
              <IntentDialog
                intent={intent}
                tenant={tenant}
                live={live?.version ?? null}
                onClose={() => {
                  setIntent(undefined);
                  state.reload();
                }}
              />
            )}
          </>
        );
      }}
    </Loaded>
  );
}

async function loadState(tenant: string, signal: AbortSignal) {
  const scope = query({ tenant });
  const [history, sets] = await Promise.all([
    admin(listSchema(publicationSchema), `/publications${scope}`, { signal }),
    admin(listSchema(maskSetSummarySchema), `/mask-sets${scope}`, { signal }),
  ]);
  return { history: history.data, sets: sets.data };
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

/** Names what is live as this page saw it: when somebody else was faster, the edge refuses and nothing changes. */
function IntentDialog(props: {
  readonly intent: Intent;
  readonly tenant: string;
  readonly live: string | null;
  readonly onClose: () => void;
}) {
  const { intent, tenant, live, onClose } = props;
  const seen = { tenant, expected_version: live };
  switch (intent.what) {
    case 'activate':
      return (
        <Confirm
          title="Make this mask set live?"
          action="Activate"
          onClose={onClose}
          act={async () => {
            const body = { ...seen, version: intent.set.version };
            await admin(publicationSchema, '/publications', { method: 'POST', body });
          }}
        >
          <p>
            {intent.set.name} ({intent.set.version}) for {tenantName(tenant)}. Requests use it within five
            seconds.
          </p>
        </Confirm>
      );
    case 'rollback':
      return (
        <Confirm
          title="Roll back?"
          action="Roll back"
          onClose={onClose}
          act={async () => {
            await admin(publicationSchema, '/publications/rollback', { method: 'POST', body: seen });
          }}
        >
          <p>
            {intent.live.version} goes, {intent.live.replaced_version} comes back for {tenantName(tenant)}.
          </p>
        </Confirm>
      );
  }
}
