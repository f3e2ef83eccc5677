/** A map of the clusters' centroids in two dimensions, with recent requests. */
import { useMemo } from 'preact/hooks';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import { type TrafficSample, trafficSampleSchema } from '../../../shared/admin/stats-wire.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { query } from '../api.ts';
import { axis, Chart, type ChartOption, type Palette, tooltip } from '../components/chart.tsx';
import { Failure } from '../components/dialog.tsx';
import { WithLiveSet } from '../components/mask-heat-map.tsx';
import { Table } from '../components/table.tsx';
import { useAnswer, useScope } from '../hooks.ts';
import { number, percent, when } from '../look.ts';
import { type Projection, projectCentroids } from './figures.ts';

export const EmbeddingMap = () => (
  <WithLiveSet>
    {({ set, publication }) => <ClusterMap set={set} version={publication.version} />}
  </WithLiveSet>
);

const NO_SAMPLES: readonly TrafficSample[] = [];

const REFRESH_ms = 15_000;

function ClusterMap({ set, version }: { readonly set: MaskSet; readonly version: string }) {
  const { tenant } = useScope();
  const path = `/traffic${query({ tenant, version })}`;
  const traffic = useAnswer(listSchema(trafficSampleSchema), path, REFRESH_ms);
  const samples = traffic.state === 'ready' ? traffic.data.data : NO_SAMPLES;
  const projection = useMemo(() => projectCentroids(set.clusters.map(({ centroid }) => centroid)), [set]);
  const option = useMemo(() => mapOption(set, projection, samples), [set, projection, samples]);
  const rows = set.clusters.map((cluster, index) => ({ cluster, index, ...projection.centroids[index]! }));
  return (
    <>
      <p>
        The two principal components of the centroids, with {percent(projection.explained, 0)} of their
        variance. A circle’s size is its cluster’s share of the calibration set. Small dots are recent
        requests ({samples.length}), in the colour of their cluster; hollow dots are far from every centroid
        (cosine below {LOW_SIMILARITY}). One request every few seconds is sampled, and only its distances are
        stored.
      </p>
      {traffic.state === 'failed' && <Failure error={traffic.error} retry={traffic.reload} />}
      <Chart label="Centroids of the live mask set in two dimensions" option={option} height_px={440} />
      <Table
        caption="Clusters"
        rows={rows}
        rowKey={({ index }) => String(index)}
        columns={[
          { title: 'Cluster', cell: ({ index }) => index, isNumber: true },
          { title: 'Prompts', cell: ({ cluster }) => cluster.label ?? '–' },
          {
            title: 'Recent requests',
            cell: ({ index }) => samples.filter(({ cluster }) => cluster === index).length,
            isNumber: true,
          },
          {
            title: 'Far from every centroid',
            cell: ({ index }) =>
              samples.filter((sample) => sample.cluster === index && isFar(sample, set)).length,
            isNumber: true,
          },
          { title: 'Share of calibration', cell: ({ cluster }) => percent(cluster.share), isNumber: true },
          { title: 'x', cell: ({ x }) => number(x, 3), isNumber: true },
          { title: 'y', cell: ({ y }) => number(y, 3), isNumber: true },
          { title: 'Mask', cell: ({ cluster }) => <code>{cluster.mask}</code> },
        ]}
      />
    </>
  );
}

/** Below this cosine a prompt is not similar to its nearest centroid. */
const LOW_SIMILARITY = 0.3;

/** The cosine with a centroid c, of a vector of length 1 at the distance d: (1 + |c|² − d²) / 2|c|. */
function similarityOf({ cluster, distances }: TrafficSample, set: MaskSet): number | null {
  const distance = distances[cluster];
  const centroid = set.clusters[cluster]?.centroid;
  if (distance === undefined || centroid === undefined) return null;
  const length_sq = centroid.reduce((sum, value) => sum + value ** 2, 0);
  return length_sq === 0 ? null : (1 + length_sq - distance ** 2) / (2 * Math.sqrt(length_sq));
}

const isFar = (sample: TrafficSample, set: MaskSet): boolean =>
  (similarityOf(sample, set) ?? 1) < LOW_SIMILARITY;

const circle_px = (share: number): number => 12 + 60 * Math.sqrt(share);

const mapOption =
  (set: MaskSet, { centroids, place }: Projection, samples: readonly TrafficSample[]) =>
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
          tooltip: { formatter: `${index}: ${label ?? ''}\n${percent(share)} of calibration` },
          value: [centroids[index]!.x, centroids[index]!.y],
          symbolSize: circle_px(share),
          itemStyle: { color: palette.series[index % palette.series.length]!, opacity: 0.8 },
        })),
        label: { show: true, formatter: '{b}', position: 'right', color: palette.text },
        // Labels of hundreds of clusters would overlap.
        labelLayout: { moveOverlap: 'shiftY', hideOverlap: true },
      },
      {
        type: 'scatter',
        symbolSize: 7,
        tooltip: { formatter: '{b}' },
        data: samples.flatMap((sample) => {
          const at = place(sample.distances);
          const color = palette.series[sample.cluster % palette.series.length]!;
          if (at === undefined) return [];
          const itemStyle = isFar(sample, set)
            ? { color: 'transparent', borderColor: color, borderWidth: 1.5 }
            : { color };
          return [{ name: aboutSample(sample, set), value: [at.x, at.y], itemStyle }];
        }),
      },
    ],
  });

function aboutSample(sample: TrafficSample, set: MaskSet): string {
  const label = set.clusters[sample.cluster]?.label ?? '';
  const cosine = number(similarityOf(sample, set), 3);
  return `request of ${when(sample.created_at)}\ncluster ${sample.cluster} ${label}\ncosine ${cosine}`;
}
