/** Where the clusters lie: their centroids in two dimensions. */
import { useMemo } from 'preact/hooks';
import type { MaskSet } from '../../../shared/mask-set.ts';
import { axis, Chart, type ChartOption, type Palette, tooltip } from '../components/chart.tsx';
import { Loaded } from '../components/notice.tsx';
import { NothingLive, SetSummary } from '../components/set-summary.tsx';
import { Table } from '../components/table.tsx';
import { number, percent } from '../format.ts';
import { useLiveSet } from '../live-set.ts';
import { type Projection, projectCentroids } from '../projection.ts';

export function EmbeddingMap() {
  const live = useLiveSet();
  return (
    <Loaded load={live}>
      {(found) =>
        found === null ? (
          <NothingLive />
        ) : (
          <>
            <SetSummary {...found} />
            <ClusterMap set={found.set} />
          </>
        )
      }
    </Loaded>
  );
}

function ClusterMap({ set }: { readonly set: MaskSet }) {
  const projection = useMemo(() => projectCentroids(set.clusters.map(({ centroid }) => centroid)), [set]);
  const option = useMemo(() => mapOption(set, projection), [set, projection]);
  const rows = set.clusters.map((cluster, index) => ({ cluster, index, ...projection.centroids[index]! }));
  return (
    <>
      <p>
        The two directions in which the centroids differ most; they hold {percent(projection.explained, 0)} of
        their variance. The larger a circle, the more of the calibration set fell into its cluster.
      </p>
      <Chart label="Centroids of the live mask set in two dimensions" option={option} height_px={440} />
      <Table
        caption="Clusters"
        rows={rows}
        rowKey={({ index }) => String(index)}
        columns={[
          { title: 'Cluster', cell: ({ index }) => index, isNumber: true },
          { title: 'Prompts', cell: ({ cluster }) => cluster.label ?? '–' },
          { title: 'Share of calibration', cell: ({ cluster }) => percent(cluster.share), isNumber: true },
          { title: 'x', cell: ({ x }) => number(x, 3), isNumber: true },
          { title: 'y', cell: ({ y }) => number(y, 3), isNumber: true },
          { title: 'Mask', cell: ({ cluster }) => <code>{cluster.mask}</code> },
        ]}
      />
    </>
  );
}

const circle_px = (share: number): number => 12 + 60 * Math.sqrt(share);

const mapOption =
  (set: MaskSet, { centroids }: Projection) =>
  (palette: Palette): ChartOption => ({
    grid: { left: 60, right: 150, top: 20, bottom: 50 },
    tooltip: { ...tooltip(palette), trigger: 'item' },
    xAxis: axis(palette, 'first component', { type: 'value', scale: true }),
    yAxis: axis(palette, 'second component', { type: 'value', scale: true, nameGap: 45 }),
    series: [
      {
        type: 'scatter',
        data: set.clusters.map(({ share, label }, index) => ({
          name: `${index}: ${label ?? ''}`,
          value: [centroids[index]!.x, centroids[index]!.y],
          symbolSize: circle_px(share),
          itemStyle: { color: palette.series[index % palette.series.length]!, opacity: 0.8 },
        })),
        label: { show: true, formatter: '{b}', position: 'right', color: palette.text },
        labelLayout: { hideOverlap: true },
        tooltip: { formatter: '{b}' },
      },
    ],
  });
