/** Experiments: the list, starting and stopping, and the results of the chosen one. */
import { useMemo, useState } from 'preact/hooks';
import {
  type Comparison,
  type Experiment,
  type ExperimentResults,
  experimentResultsSchema,
  experimentSchema,
  METRICS,
  type Metric,
} from '../../../shared/admin/experiment-wire.ts';
import type { StickyKind } from '../../../shared/mask/sticky.ts';
import { admin, query } from '../api.ts';
import { axis, Chart, type ChartOption, type Palette, tooltip } from '../components/chart.tsx';
import { Choice, ForChange, RowButton, type SearchProps, useSearch } from '../components/controls.tsx';
import { Confirm, Detail, Empty, Loaded } from '../components/dialog.tsx';
import { type Column, FIGURE_COLUMNS, ListTable, Table } from '../components/table.tsx';
import { type List, useAddress, useAddressOf, useAnswer, useList, useScope } from '../hooks.ts';
import { digitsOf, number, percent, pValue, unreadableHere, when } from '../look.ts';
import { NewExperiment } from './new-experiment.tsx';

type Open =
  | { readonly what: 'new' }
  | { readonly what: 'start' | 'stop' | 'delete'; readonly experiment: Experiment };

export function Experiments() {
  const { tenant } = useScope();
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useAddress('experiment', '');
  const { q, search } = useSearch('Search experiments: an id or a tenant');
  const experiments = useList(experimentSchema, '/experiments', { tenant, q });
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
        search={search}
        onAct={(what, experiment) => setOpen({ what, experiment })}
        onShow={(experiment) => setShown(keyOf(experiment))}
      />
      {shown !== '' && <Shown key={shown} name={shown} onClose={() => setShown('')} />}
      {open?.what === 'new' && <NewExperiment onClose={close} />}
      {open !== undefined && open.what !== 'new' && (
        <Act what={open.what} experiment={open.experiment} onClose={close} />
      )}
    </>
  );
}

function ExperimentTable(props: {
  readonly experiments: List<Experiment>;
  readonly search: SearchProps;
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
        { title: 'State', cell: stateOf, sort: ({ state }) => state },
        { title: 'Tenants', cell: tenantsOf },
        {
          title: 'Regions',
          cell: ({ regions }) => regions.flatMap(Object.values).join(', ') || 'everywhere',
        },
        { title: 'Models', cell: ({ models }) => models.join(', ') || 'all' },
        {
          title: 'Variants',
          cell: ({ variants }) =>
            variants.length === 1
              ? `${variants[0]!.name} for everybody`
              : variants.map(({ name, weight }) => `${name} ${weight}`).join(' : '),
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
                experiment.unreadable === undefined &&
                button('Start', experiment, () => props.onAct('start', experiment))}{' '}
              {experiment.state === 'draft' &&
                button('Delete', experiment, () => props.onAct('delete', experiment))}
              {(experiment.state === 'running' || experiment.state === 'scheduled') &&
                button('Stop', experiment, () => props.onAct('stop', experiment))}{' '}
              {experiment.state !== 'draft' &&
                experiment.unreadable === undefined &&
                button('Results', experiment, () => props.onShow(experiment))}
            </>
          ),
        },
      ]}
    />
  );
}

/** One that cannot be read takes no requests here, whatever its state. */
const stateOf = ({ state, unreadable }: Experiment): string => state + unreadableHere(unreadable);

/** The chosen experiment may not be on the loaded pages of the list. */
function Shown({ name, onClose }: { readonly name: string; readonly onClose: () => void }) {
  const [tenant = '', id = ''] = name.split('/');
  const found = useAnswer(experimentSchema, `/experiments/${id}${query({ tenant })}`);
  return (
    <Detail title={`Results of ${id}`} onClose={onClose}>
      <Loaded load={found}>{(experiment) => <Results experiment={experiment} />}</Loaded>
    </Detail>
  );
}

/** Two tenants may have the same id. */
const keyOf = ({ tenant, id }: Experiment): string => `${tenant}/${id}`;

const tenantsOf = ({ tenant, tenants }: Experiment): string =>
  tenant !== '' ? tenant : tenants.length === 0 ? 'All tenants' : tenants.join(', ');

const ACTS = {
  start: {
    title: 'Start this experiment?',
    action: 'Start',
    what: 'Its variants get requests. It cannot be changed any more.',
  },
  stop: {
    title: 'Stop this experiment?',
    action: 'Stop',
    what: 'Its requests use the live mask set again. It cannot be restarted.',
  },
  delete: {
    title: 'Delete this draft?',
    action: 'Delete',
    what: 'It was never started, so no results are lost.',
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

/* Results of an experiment: figures for each variant, and differences with anytime-valid intervals. */

const REFRESH_ms = 15_000;

const METRIC_NAMES: Record<Metric, string> = {
  error_rate: 'share of errors',
  ttft_ms: 'ms to the first token',
  tpot_ms: 'ms/token',
  completion_tokens: 'tokens an answer',
  rating_up: 'share of good ratings',
  agreement: 'agreement with dense',
};

function Results({ experiment }: { readonly experiment: Experiment }) {
  const [region, setRegion] = useAddress('region', '');
  const asked = query({ tenant: experiment.tenant, region: region || undefined });
  const path = `/experiments/${experiment.id}/results${asked}`;
  const results = useAnswer(experimentResultsSchema, path, REFRESH_ms);
  return (
    <>
      <label>
        Only requests from, like EU, EU/DE or EU/DE/FRA (empty: everywhere)
        <input defaultValue={region} onChange={(event) => setRegion(event.currentTarget.value.trim())} />
      </label>
      <Loaded load={results}>{(found) => <Picture results={found} sticky={experiment.sticky} />}</Loaded>
    </>
  );
}

type PictureProps = { readonly results: ExperimentResults; readonly sticky: StickyKind };

const WEIGHT_COLUMN: Column<ExperimentResults['variants'][number]> = {
  title: 'Weight',
  cell: ({ weight }) => weight,
  isNumber: true,
};

function Picture(props: PictureProps) {
  const { results } = props;
  const isCompared = results.variants.length > 1;
  return (
    <>
      <Table
        caption="Variants"
        rows={results.variants}
        rowKey={({ name }) => name}
        columns={[
          {
            title: 'Variant',
            cell: ({ name }) => (isCompared && name === results.control ? `${name} (control)` : name),
          },
          { title: 'Mask set', cell: ({ mask_set }) => <code>{mask_set}</code> },
          ...(isCompared ? [WEIGHT_COLUMN] : []),
          ...FIGURE_COLUMNS,
        ]}
      />
      {isCompared ? <Differences {...props} /> : <small>Its only variant is a set for everybody.</small>}
    </>
  );
}

function Differences({ results, sticky }: PictureProps) {
  const [metric, setMetric] = useAddressOf('figure', METRICS, 'tpot_ms');
  const rows = results.comparisons.filter((row) => row.metric === metric);
  const drawn = rows.filter(({ difference }) => difference !== null);
  const option = useMemo(() => intervalOption(drawn, metric), [results, metric]);
  return (
    <>
      <Choice
        title="Compared by"
        value={metric}
        options={METRICS.map((name) => [name, METRIC_NAMES[name]])}
        onPick={setMetric}
      />
      {drawn.length === 0 ? (
        <Empty>Too few values on one side for an interval of this figure.</Empty>
      ) : (
        <Chart
          label={`Difference from ${results.control} in ${METRIC_NAMES[metric]}, with intervals`}
          option={option}
          height_px={120 + 40 * drawn.length}
        />
      )}
      <Table
        caption={`Differences from ${results.control}`}
        rows={results.comparisons}
        rowKey={(row) => `${row.variant} ${row.metric}`}
        columns={[
          { title: 'Variant', cell: (row) => row.variant },
          { title: 'Figure', cell: (row) => METRIC_NAMES[row.metric] },
          { title: results.control, cell: (row) => figure(row, row.control_mean), isNumber: true },
          { title: 'Variant’s', cell: (row) => figure(row, row.mean), isNumber: true },
          { title: 'Difference', cell: (row) => figure(row, row.difference), isNumber: true },
          { title: `${percent(1 - results.alpha, 0)} interval`, cell: intervalOf, isNumber: true },
          { title: 'p', cell: (row) => pValue(row.p_value), isNumber: true },
          { title: 'Verdict', cell: (row) => row.verdict.replaceAll('_', ' ') },
        ]}
      />
      <small>
        Intervals and p-values stay valid however often you look, if requests are independent. Requests of one{' '}
        {sticky.replaceAll('_', ' ')} are not: the more of them each has, the more intervals are too narrow
        and p-values too small.
      </small>
    </>
  );
}

const figure = ({ low, high }: Comparison, value: number | null): string =>
  number(value, digitsOf(low, high));
const intervalOf = (row: Comparison): string =>
  row.low === null || row.high === null ? '–' : `${figure(row, row.low)} to ${figure(row, row.high)}`;

const intervalOption =
  (rows: readonly Comparison[], metric: Metric) =>
  (palette: Palette): ChartOption => ({
    grid: { left: 140, right: 40, top: 20, bottom: 55 },
    tooltip: { ...tooltip(palette), trigger: 'item' },
    // Without `scale` the axis includes 0: what matters is whether an interval contains it.
    xAxis: axis(palette, `difference in ${METRIC_NAMES[metric]}`, { type: 'value' }),
    yAxis: {
      type: 'category',
      data: rows.map(({ variant }) => variant),
      axisLabel: { color: palette.text },
      axisLine: { lineStyle: { color: palette.text } },
    },
    series: rows.flatMap((row, index) => {
      const { variant, low, high, difference } = row;
      const color = palette.series[index % palette.series.length]!;
      return [
        {
          type: 'line' as const,
          symbol: 'none',
          lineStyle: { color, width: 3 },
          data: [
            [low!, variant],
            [high!, variant],
          ],
        },
        {
          type: 'scatter' as const,
          symbolSize: 12,
          itemStyle: { color },
          data: [{ name: variant, value: [difference!, variant] }],
          tooltip: { formatter: `${variant}: ${figure(row, difference)} (${intervalOf(row)})` },
        },
      ];
    }),
  });
