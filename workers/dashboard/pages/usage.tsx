/** Usage: requests and tokens, by day, model, mask or tenant. */
import { useMemo } from 'preact/hooks';
import {
  USAGE_GROUPS,
  type UsageGroup,
  type UsageRow,
  usageRowSchema,
} from '../../../shared/admin/admin-wire.ts';
import { axis, Chart, type ChartOption, legend, type Palette, tooltip } from '../components/chart.tsx';
import { Choice } from '../components/controls.tsx';
import { type Column, ListTable } from '../components/table.tsx';
import { useAddressOf, useList, useScope } from '../hooks.ts';
import { number } from '../look.ts';

export function Usage() {
  const { tenant } = useScope();
  const [group, setGroup] = useAddressOf('by', USAGE_GROUPS, 'day');
  const usage = useList(
    usageRowSchema,
    '/usage',
    { tenant: tenant || undefined, group },
    { cursor: 'after' },
  );
  return (
    <>
      <div class="row">
        <Choice
          title="By"
          value={group}
          options={USAGE_GROUPS.map((name) => [name, name])}
          onPick={setGroup}
        />
      </div>
      {group === 'day' && usage.state === 'ready' && usage.data.length > 0 && <Days rows={usage.data} />}
      <ListTable
        caption="The last 30 days, in UTC"
        list={usage}
        empty="Nothing was used in the last 30 days."
        rowKey={(row) => nameOf(row, group)}
        columns={[
          { title: GROUP_TITLES[group], cell: (row) => nameOf(row, group) },
          counted('Requests', (row) => row.requests),
          counted('Failed, refused or cancelled', (row) => row.errors),
          counted('Prompt tokens', (row) => row.prompt_tokens),
          counted('Completion tokens', (row) => row.completion_tokens),
        ]}
      />
    </>
  );
}

const GROUP_TITLES: Record<UsageGroup, string> = {
  tenant: 'Tenant',
  day: 'Day',
  model: 'Model',
  mask: 'Mask',
};

const counted = (title: string, count: (row: UsageRow) => number): Column<UsageRow> => ({
  title,
  sort: count,
  isNumber: true,
  cell: (row) => number(count(row)),
});

const nameOf = (row: UsageRow, group: UsageGroup): string => row[group] ?? '–';

function Days({ rows }: { readonly rows: readonly UsageRow[] }) {
  const option = useMemo(() => daysOption(rows), [rows]);
  return <Chart label="Tokens a day" option={option} height_px={260} />;
}

const daysOption =
  (rows: readonly UsageRow[]) =>
  (palette: Palette): ChartOption => {
    const line = (name: string, value: (row: UsageRow) => number) => ({
      type: 'line' as const,
      name,
      data: rows.map((row) => [row.day!, value(row)]),
    });
    return {
      grid: { left: 80, right: 30, top: 40, bottom: 40 },
      legend: legend(palette),
      tooltip: { ...tooltip(palette), trigger: 'axis' },
      xAxis: axis(palette, '', { type: 'time', minInterval: 86_400_000 }),
      yAxis: axis(palette, 'tokens', { type: 'value', nameGap: 60 }),
      series: [
        line('prompt tokens', (row) => row.prompt_tokens),
        line('completion tokens', (row) => row.completion_tokens),
      ],
    };
  };
