/** Experiments: which there are, how they are started and stopped, and what came of the one in view. */
import { useState } from 'preact/hooks';
import { type Experiment, experimentSchema } from '../../../shared/admin/experiment-wire.ts';
import { admin, query } from '../api.ts';
import { ForChange, RowButton } from '../components/controls.tsx';
import { Confirm } from '../components/dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { ListTable } from '../components/table.tsx';
import { type List, useAddress, useList, useLoad, useScope } from '../hooks.ts';
import { when } from '../look.ts';
import { Results } from './experiment-results.tsx';
import { NewExperiment } from './new-experiment.tsx';

type Open =
  | { readonly what: 'new' }
  | { readonly what: 'start' | 'stop' | 'delete'; readonly experiment: Experiment };

export function Experiments() {
  const { tenant } = useScope();
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useAddress('experiment', '');
  const [q, setQ] = useAddress('q', '');
  const experiments = useList(experimentSchema, '/experiments', { tenant, q: q || undefined });
  const close = () => setOpen(undefined);
  return (
    <>
      <ForChange>
        <button type="button" onClick={() => setOpen({ what: 'new' })}>
          New experiment
        </button>
      </ForChange>
      <ExperimentTable
        experiments={experiments}
        search={{ title: 'Search experiments: an id or a tenant', value: q, onSearch: setQ }}
        onAct={(what, experiment) => setOpen({ what, experiment })}
        onShow={(experiment) => setShown(keyOf(experiment))}
      />
      {shown !== '' && <Shown key={shown} name={shown} />}
      {open?.what === 'new' && <NewExperiment onClose={close} />}
      {open !== undefined && open.what !== 'new' && (
        <Act what={open.what} experiment={open.experiment} onClose={close} />
      )}
    </>
  );
}

function ExperimentTable(props: {
  readonly experiments: List<Experiment>;
  readonly search: {
    readonly title: string;
    readonly value: string;
    readonly onSearch: (text: string) => void;
  };
  readonly onAct: (what: 'start' | 'stop' | 'delete', experiment: Experiment) => void;
  readonly onShow: (experiment: Experiment) => void;
}) {
  const button = (title: string, experiment: Experiment, act: () => void) => (
    <RowButton
      title={title}
      about={experiment.id}
      reads={title === 'Results'}
      destroys={title === 'Stop' || title === 'Delete'}
      onClick={act}
    />
  );
  return (
    <ListTable
      caption="Experiments"
      list={props.experiments}
      search={props.search}
      empty="No experiments yet."
      rowKey={keyOf}
      columns={[
        { title: 'Id', cell: ({ id }) => <code>{id}</code>, sort: ({ id }) => id },
        { title: 'State', cell: ({ state }) => state, sort: ({ state }) => state },
        { title: 'Tenants', cell: tenantsOf },
        {
          title: 'Regions',
          cell: ({ regions }) => regions.flatMap(Object.values).join(', ') || 'everywhere',
        },
        { title: 'Models', cell: ({ models }) => models.join(', ') || 'every one' },
        {
          title: 'Variants',
          cell: ({ variants }) => variants.map(({ name, weight }) => `${name} ${weight}`).join(' : '),
        },
        { title: 'Sticky unit', cell: ({ sticky }) => sticky.replaceAll('_', ' ') },
        { title: 'Begins', cell: ({ started_at, starts_at }) => when(started_at ?? starts_at ?? null) },
        { title: 'Ends', cell: ({ ends_at, stopped_at }) => when(stopped_at ?? ends_at ?? null) },
        {
          title: 'Change',
          isActions: true,
          cell: (experiment) => (
            <>
              {experiment.state === 'draft' &&
                button('Start', experiment, () => props.onAct('start', experiment))}{' '}
              {experiment.state === 'draft' &&
                button('Delete', experiment, () => props.onAct('delete', experiment))}
              {(experiment.state === 'running' || experiment.state === 'scheduled') &&
                button('Stop', experiment, () => props.onAct('stop', experiment))}{' '}
              {experiment.state !== 'draft' && button('Results', experiment, () => props.onShow(experiment))}
            </>
          ),
        },
      ]}
    />
  );
}

/** The one in view need not be on the page of the list that is loaded. */
function Shown({ name }: { readonly name: string }) {
  const [tenant = '', id = ''] = name.split('/');
  const found = useLoad(['experiment', name], (signal) =>
    admin(experimentSchema, `/experiments/${id}${query({ tenant })}`, { signal }),
  );
  return <Loaded load={found}>{(experiment) => <Results experiment={experiment} />}</Loaded>;
}

/** Two tenants may have the same id. */
const keyOf = ({ tenant, id }: Experiment): string => `${tenant}/${id}`;

const tenantsOf = ({ tenant, tenants }: Experiment): string =>
  tenant !== '' ? tenant : tenants.length === 0 ? 'All tenants' : tenants.join(', ');

const ACTS = {
  start: {
    title: 'Start this experiment?',
    action: 'Start',
    what: 'It is fixed from then on, and its variants get requests.',
  },
  stop: {
    title: 'Stop this experiment?',
    action: 'Stop',
    what: 'Its requests get what is live. It cannot be started again.',
  },
  delete: {
    title: 'Delete this draft?',
    action: 'Delete',
    what: 'It was never started, so nothing else goes with it.',
  },
} as const;

function Act(props: {
  readonly what: keyof typeof ACTS;
  readonly experiment: Experiment;
  readonly onClose: () => void;
}) {
  const { what, experiment, onClose } = props;
  const { title, action, what: consequence } = ACTS[what];
  const act = async () => {
    const path = `/experiments/${experiment.id}`;
    const whose = query({ tenant: experiment.tenant });
    if (what === 'delete') await admin(experimentSchema, `${path}${whose}`, { method: 'DELETE' });
    else await admin(experimentSchema, `${path}/${what}${whose}`, { method: 'POST', body: {} });
  };
  return (
    <Confirm
      title={title}
      action={`${action} ${experiment.id}`}
      destroys={what !== 'start'}
      act={act}
      onClose={onClose}
    >
      <p>
        <code>{experiment.id}</code>: {consequence}
      </p>
    </Confirm>
  );
}
