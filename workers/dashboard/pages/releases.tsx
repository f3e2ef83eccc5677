/** Releases: the versions in use with their shares, the rollout, rolling back, and publishing other sets. */

import { useEffect, useState } from 'preact/hooks';
import {
  type LivePublication,
  livePublicationSchema,
  type MaskSetSummary,
  maskSetSummarySchema,
  type Publication,
  type PublishBody,
  publicationInUseSchema,
  publicationSchema,
  type ServedPart,
} from '../../../shared/admin/publication-wire.ts';
import { type ReleaseComparison, releaseComparisonSchema } from '../../../shared/admin/stats-wire.ts';
import { admin, edgeNow_ms, noneIfNotFound, query } from '../api.ts';
import {
  RolloutFields,
  RowButton,
  rolloutIn,
  TimeField,
  timeAheadIn,
  useSearch,
} from '../components/controls.tsx';
import { Confirm, FormDialog, Loaded, Unreadable } from '../components/dialog.tsx';
import { ListTable, Table, Version, When } from '../components/table.tsx';
import { useList, useLoad, useScope } from '../hooks.ts';
import { duration, number, percent, setOwner, sharePercent, shortVersion, when, whose } from '../look.ts';

/** The action that the person is about to confirm. */
type Intent =
  | { readonly what: 'activate'; readonly set: MaskSetSummary; readonly seen: string | null }
  | { readonly what: Change; readonly live: LivePublication };
type Change = 'rollback' | 'promote' | 'pause' | 'resume';

const REFRESH_ms = 5_000;

export function Releases() {
  const { tenant, mayChange } = useScope();
  const [intent, setIntent] = useState<Intent>();
  const state = useLoad(['releases', tenant], (signal) => loadState(tenant, signal), REFRESH_ms);
  const live = state.state === 'ready' ? state.data.live : null;
  const close = () => setIntent(undefined);
  return (
    <>
      <Loaded load={state}>
        {(found) => (
          <>
            <Serving {...found} tenant={tenant} />
            {mayChange && found.live !== null && (
              <Steps live={found.live} onAct={(what) => setIntent({ what, live: found.live! })} />
            )}
            {found.comparison !== null && <Comparison comparison={found.comparison} live={found.live} />}
          </>
        )}
      </Loaded>
      <MaskSets
        live={live}
        onActivate={(set) => setIntent({ what: 'activate', set, seen: live?.version ?? null })}
      />
      <History />
      {intent?.what === 'activate' && <ActivateDialog {...intent} tenant={tenant} onClose={close} />}
      {intent !== undefined && intent.what !== 'activate' && (
        <ActDialog what={intent.what} live={intent.live} tenant={tenant} onClose={close} />
      )}
    </>
  );
}

async function loadState(tenant: string, signal: AbortSignal) {
  const scope = query({ tenant });
  const [live, inUse] = await Promise.all([
    admin(livePublicationSchema, `/publications/live${scope}`, { signal }).catch(noneIfNotFound),
    admin(publicationInUseSchema, `/publications/in-use${scope}`, { signal }).catch(noneIfNotFound),
  ]);
  const comparison =
    live === null
      ? null
      : await admin(releaseComparisonSchema, `/publications/comparison${scope}`, { signal }).catch(
          noneIfNotFound,
        );
  return { live, parts: inUse?.parts ?? [], comparison };
}

/* The versions in use. */

function Serving(props: {
  readonly tenant: string;
  readonly live: LivePublication | null;
  readonly parts: readonly ServedPart[];
}) {
  const { tenant, live, parts } = props;
  const shown = parts.length === 0 ? [{ tenant, version: null, share: 1 }] : parts;
  const coming = live !== null && live.share === 0 ? live : null;
  return (
    <section aria-label="Serving now" class="serving">
      <div role="status">
        <ul>
          {shown.map((part) => (
            <li key={`${part.tenant} ${part.version}`}>
              <strong>{stateOf(part, live)}</strong>{' '}
              {part.version === null ? 'the dense model' : <code>{part.version}</code>}
              {part.version !== null && part.tenant !== tenant && ` (${setOwner(part.tenant)})`}
              <meter
                min={0}
                max={1}
                value={part.share}
                aria-label={`Share of ${part.version ?? 'the dense model'}`}
              />
            </li>
          ))}
          {coming !== null && (
            <li>
              <strong>
                {coming.paused_at === null
                  ? `scheduled for ${when(coming.activate_at)}`
                  : 'scheduled, paused'}
              </strong>{' '}
              <code>{coming.version}</code>
            </li>
          )}
        </ul>
      </div>
      <small>For {whose(tenant)}. A change takes effect everywhere within five seconds.</small>
    </section>
  );
}

function stateOf({ version, share }: ServedPart, live: LivePublication | null): string {
  const isOnItsWay = live !== null && live.version === version && live.share > 0 && live.share < 1;
  if (!isOnItsWay) return `serving ${sharePercent(share)}`;
  return live.paused_at === null ? `rolling out ${sharePercent(share)}` : `paused at ${sharePercent(share)}`;
}

function Steps({ live, onAct }: { readonly live: LivePublication; readonly onAct: (what: Change) => void }) {
  const isOnItsWay = live.share < 1;
  return (
    <div class="row">
      {isOnItsWay && live.unreadable === undefined && (
        <>
          <button type="button" onClick={() => onAct('promote')}>
            Promote
          </button>
          {live.paused_at === null ? (
            <button type="button" class="secondary" onClick={() => onAct('pause')}>
              Pause
            </button>
          ) : (
            <button type="button" class="secondary" onClick={() => onAct('resume')}>
              Resume
            </button>
          )}
        </>
      )}
      <button
        type="button"
        class="danger"
        disabled={live.previous_version === null && live.share === 1}
        onClick={() => onAct('rollback')}
      >
        Roll back
      </button>
      {isOnItsWay && live.unreadable === undefined && <p class="next">{nextOf(live)}</p>}
      <Unreadable what={live.unreadable === undefined ? [] : [live.unreadable]} />
    </div>
  );
}

/** The next share and a countdown to it. */
function nextOf(live: LivePublication) {
  if (live.paused_at !== null) return `Paused since ${when(live.paused_at)}: nothing goes on by itself.`;
  const next = live.rollout.find(({ share }) => share > live.share)?.share ?? 1;
  return live.next_step_at === null ? (
    ''
  ) : (
    <>
      Next step, {sharePercent(next)}, in <Countdown to_ms={Date.parse(live.next_step_at)} />
    </>
  );
}

function Countdown({ to_ms }: { readonly to_ms: number }) {
  const [now_ms, setNow] = useState(edgeNow_ms());
  useEffect(() => {
    const timer = setInterval(() => setNow(edgeNow_ms()), 1_000);
    return () => clearInterval(timer);
  }, []);
  return <span role="timer">{duration(to_ms - now_ms)}</span>;
}

function Comparison(props: {
  readonly comparison: ReleaseComparison;
  readonly live: LivePublication | null;
}) {
  const { sides, minutes, from } = props.comparison;
  const isPair = sides.length > 1;
  return (
    <>
      <Table
        caption={
          isPair ? 'The newest version beside the version that it replaces' : 'The version that serves'
        }
        rows={sides}
        rowKey={({ version }) => version}
        columns={[
          { title: 'Version', cell: ({ version }) => <Version of={version} /> },
          { title: 'Requests', cell: ({ requests }) => number(requests), isNumber: true },
          { title: 'Errors', cell: ({ error_rate }) => percent(error_rate), isNumber: true },
          { title: 'First token, ms', cell: ({ ttft_ms }) => number(ttft_ms), isNumber: true },
          { title: 'ms/token', cell: ({ tpot_ms }) => number(tpot_ms, 1), isNumber: true },
        ]}
      />
      <p>
        <small>
          {isPair
            ? minutes === 0
              ? 'Not comparable yet: there is no minute in which both answered.'
              : `Counted in the ${minutes} minutes since ${when(from)} in which both answered.`
            : `Since ${when(from)}.`}
        </small>
      </p>
    </>
  );
}

/* The history, and the stored mask sets. */

function History() {
  const { tenant } = useScope();
  const { q, search } = useSearch('Search the history: a version, who, or why', 'history');
  const list = useList(publicationSchema, '/publications', { tenant, q }, { every_ms: REFRESH_ms });
  return (
    <ListTable
      caption="History"
      list={list}
      empty="No publications yet."
      search={search}
      rowKey={({ id }) => id}
      columns={[
        { title: 'When', cell: (row) => <When at={row.created_at} /> },
        { title: 'What', cell: (row) => row.action },
        { title: 'Version', cell: ({ version }) => <Version of={version} none="nothing" /> },
        {
          title: 'Instead of',
          cell: ({ replaced_version: old }) => <Version of={old} none="nothing" />,
        },
        { title: 'How', cell: howOf },
        { title: 'By', cell: (row) => <code>{row.actor}</code> },
      ]}
    />
  );
}

function howOf({ action, rollout, auto_rollback: bounds, reason, unreadable }: Publication): string {
  if (unreadable !== undefined) return `not readable here (${unreadable})`;
  if (action === 'pause') return 'its steps are paused';
  const steps = rollout.map(
    ({ share, duration_s }) => `${sharePercent(share)} for ${duration(1000 * duration_s)}`,
  );
  const parts = [
    steps.length === 0 ? 'for everyone' : `${steps.join(', ')}, then everyone`,
    ...(bounds === null ? [] : ['automatic rollback']),
    ...(reason === null ? [] : [`because ${reason}`]),
  ];
  return parts.join('; ');
}

function MaskSets(props: {
  readonly live: LivePublication | null;
  readonly onActivate: (set: MaskSetSummary) => void;
}) {
  const { live } = props;
  const { tenant } = useScope();
  const { q, search } = useSearch('Search mask sets: a name, version or model', 'set');
  const list = useList(maskSetSummarySchema, '/mask-sets', { tenant, q }, { every_ms: REFRESH_ms });
  return (
    <ListTable
      caption="Mask sets"
      list={list}
      empty="No mask sets yet. “maskroute publish FILE” uploads one."
      search={search}
      rowKey={({ version }) => version}
      columns={[
        { title: 'Version', cell: ({ version }) => <Version of={version} /> },
        { title: 'Name', cell: (set) => set.name, sort: (set) => set.name },
        { title: 'Model', cell: (set) => set.model.name, sort: (set) => set.model.name },
        { title: 'Clusters', cell: (set) => set.clusters, sort: (set) => set.clusters, isNumber: true },
        {
          title: 'Blocks skipped',
          cell: (set) => percent(set.reached_sparsity),
          sort: (set) => set.reached_sparsity,
          isNumber: true,
        },
        { title: 'Uploaded', cell: (set) => when(set.created_at), sort: (set) => set.created_at },
        {
          title: 'Release',
          isActions: true,
          cell: (set) =>
            live !== null && set.version === live.version ? (
              placeOf(live)
            ) : (
              <RowButton title="Activate" about={set.version} onClick={() => props.onActivate(set)} />
            ),
        },
      ]}
    />
  );
}

const placeOf = ({ share, paused_at }: LivePublication): string => {
  if (share === 1) return 'serving';
  if (paused_at !== null) return 'paused';
  return share === 0 ? 'scheduled' : 'rolling out';
};

/*
 * Publishing a set, at once or in steps, and changing a rollout. Each request names what is live as this page saw it; if
 * somebody else was faster, the edge refuses and nothing changes.
 */

function ActivateDialog(props: {
  readonly set: MaskSetSummary;
  readonly tenant: string;
  readonly seen: string | null;
  readonly onClose: () => void;
}) {
  const { set, tenant, seen, onClose } = props;
  return (
    <FormDialog
      title="Make this mask set live?"
      action="Activate"
      onClose={onClose}
      onSubmit={async (form) => {
        const body: PublishBody = {
          version: set.version,
          tenant,
          expected_version: seen,
          ...timeAheadIn(form, 'activate_at'),
          ...rolloutIn(form),
        };
        await admin(publicationSchema, '/publications', { method: 'POST', body });
        onClose();
      }}
    >
      <p>
        {set.name} ({set.version}) for {whose(tenant)}. It takes effect everywhere within five seconds.
      </p>
      <RolloutFields />
      <TimeField name="activate_at" title="Not before (empty: now)" />
    </FormDialog>
  );
}

type Act = {
  readonly title: string;
  readonly action: (live: LivePublication) => string;
  readonly says: (live: LivePublication, tenant: string) => string;
  readonly path: string;
  readonly body: (live: LivePublication) => object;
  readonly destroys?: boolean;
};

/** The same version may be published again meanwhile, over another one. */
const thisPublication = ({ id }: LivePublication) => ({ expected_publication: id });
const ACTS: Record<Change, Act> = {
  rollback: {
    title: 'Roll back?',
    action: ({ version }) => `Roll back ${shortVersion(version)}`,
    says: (live, tenant) =>
      `${live.previous_version ?? whatIsLeft(tenant)} replaces ${live.version} for ${whose(tenant)}.`,
    path: '/publications/rollback',
    body: thisPublication,
    destroys: true,
  },
  promote: {
    title: 'Promote to everyone?',
    action: () => 'Promote',
    says: ({ version }, tenant) =>
      `Every conversation of ${whose(tenant)} sees ${version} within five seconds.`,
    path: '/publications',
    body: ({ version, auto_rollback }) => ({ version, ...(auto_rollback === null ? {} : { auto_rollback }) }),
  },
  pause: {
    title: 'Pause the rollout?',
    action: () => 'Pause',
    says: ({ version, share }) =>
      `${version} stays at ${sharePercent(share)}: the same conversations see it until somebody resumes.`,
    path: '/publications/pause',
    body: thisPublication,
  },
  resume: {
    title: 'Resume the rollout?',
    action: () => 'Resume',
    says: ({ version, share }) =>
      `${version} continues from ${sharePercent(share)}; the time of the pause does not count towards its steps.`,
    path: '/publications/resume',
    body: thisPublication,
  },
};

function ActDialog(props: {
  readonly what: Change;
  readonly live: LivePublication;
  readonly tenant: string;
  readonly onClose: () => void;
}) {
  const { what, live, tenant, onClose } = props;
  const { title, action, says, path, body, destroys = false } = ACTS[what];
  const act = async () => {
    const asked = { tenant, expected_version: live.version, ...body(live) };
    await admin(publicationSchema, path, { method: 'POST', body: asked });
  };
  return (
    <Confirm title={title} action={action(live)} destroys={destroys} onClose={onClose} act={act}>
      <p>{says(live, tenant)}</p>
    </Confirm>
  );
}

/** What is live after a first publication was cancelled. */
const whatIsLeft = (tenant: string): string => (tenant === '' ? 'the dense model' : 'the default mask set');
