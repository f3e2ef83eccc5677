/**
 * The live mask set, and its masks as a picture that is a table: a column a layer, two rows a cluster (attention and
 * FFN). The last two rows say which share of the calibration set skips the block.
 */
import type { ComponentChildren } from 'preact';
import { maskFromBits } from '../../../shared/mask/mask.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { type LiveSet, useLiveSet, useScope } from '../hooks.ts';
import { percent, tenantName, when } from '../look.ts';
import { Empty, Loaded, Notice } from './notice.tsx';
import { type FactList, Facts, Scroll } from './table.tsx';

export const LiveMasks = () => <WithLiveSet>{({ set }) => <MaskHeatMap set={set} />}</WithLiveSet>;

/** What a page shows of the live mask set, below the set's own figures; or that there is none. */
export function WithLiveSet({ children }: { readonly children: (live: LiveSet) => ComponentChildren }) {
  const live = useLiveSet();
  return (
    <Loaded load={live}>
      {(found) =>
        found === null ? (
          <Empty>No mask set is live: every request runs dense.</Empty>
        ) : (
          <>
            <SetSummary {...found} />
            {children(found)}
          </>
        )
      }
    </Loaded>
  );
}

function SetSummary({ publication, set }: LiveSet) {
  const { tenant } = useScope();
  const facts: FactList = [
    ['Mask set', set.name],
    ['Version', publication.version],
    ['Model', set.model.name],
    ['Encoder', `${set.encoder.id} (${set.encoder.dimensions} dimensions)`],
    ['Blocks out', `${percent(set.reachedSparsity)} (target ${percent(set.targetSparsity)})`],
    ['Surrogates', set.surrogate ? 'stand in for skipped blocks' : 'none: skipped blocks leave a hole'],
    ['Live since', when(publication.activate_at)],
  ];
  return (
    <>
      {publication.tenant !== tenant && (
        <Notice kind="info">
          {tenantName(tenant)} has no mask set of its own: its requests use the default one, which this is.
        </Notice>
      )}
      <Facts facts={facts} />
    </>
  );
}

const KINDS = ['attention', 'FFN'] as const;
const HEAT_STEPS = 10;

type HeatRow = {
  readonly title: string;
  readonly detail: string;
  /** For attention and FFN, a number a layer: 0 = runs, 1 = skipped. */
  readonly heat: readonly [readonly number[], readonly number[]];
};

function MaskHeatMap({ set }: { readonly set: MaskSet }) {
  const layers = Array.from({ length: set.model.blockCount / 2 }, (_, layer) => layer);
  const rows = heatRows(set);
  return (
    <Scroll label="Masks of the live set">
      <table class="heat">
        <caption>
          Which blocks each cluster skips. Dark cells are skipped; the last rows show the share of prompts
          that skip the block.
        </caption>
        <thead>
          <tr>
            <th scope="col">Cluster</th>
            <th scope="col">Block</th>
            {layers.map((layer) => (
              <th key={layer} scope="col">
                {layer}
              </th>
            ))}
            <th scope="col">Skipped</th>
          </tr>
        </thead>
        {rows.map((row) => (
          <tbody key={row.title}>
            {KINDS.map((kind, index) => (
              <tr key={kind}>
                {index === 0 && (
                  <th scope="rowgroup" rowSpan={2}>
                    {row.title} <small>{row.detail}</small>
                  </th>
                )}
                <th scope="row">{kind}</th>
                {layers.map((layer) => (
                  <Cell key={layer} heat={row.heat[index]![layer]!} />
                ))}
                <td class="number">{percent(mean(row.heat[index]!), 0)}</td>
              </tr>
            ))}
          </tbody>
        ))}
      </table>
    </Scroll>
  );
}

function Cell({ heat }: { readonly heat: number }) {
  const text = heat === 0 ? 'runs' : heat === 1 ? 'skipped' : `skipped by ${percent(heat, 0)}`;
  return (
    <td class={`heat-${Math.round(heat * HEAT_STEPS)}`} title={text}>
      <span class="hidden">{text}</span>
    </td>
  );
}

function heatRows(set: MaskSet): HeatRow[] {
  const skipped = set.clusters.map(({ bits }) =>
    [...maskFromBits(set.model.blockCount, bits).runs].map((runs) => 1 - runs),
  );
  const split = (blocks: readonly number[]): HeatRow['heat'] => [
    blocks.filter((_, block) => block % 2 === 0),
    blocks.filter((_, block) => block % 2 === 1),
  ];
  const total = set.clusters.reduce((sum, { share }) => sum + share, 0) || 1;
  const weighted = skipped[0]!.map((_, block) =>
    set.clusters.reduce((sum, { share }, index) => sum + (share / total) * skipped[index]![block]!, 0),
  );
  return [
    ...set.clusters.map((cluster, index) => ({
      title: `${index}`,
      detail: `${cluster.label ?? ''} · ${percent(cluster.share, 0)} of prompts`,
      heat: split(skipped[index]!),
    })),
    { title: 'All', detail: 'weighted by prompts', heat: split(weighted.map((heat) => Math.min(1, heat))) },
  ];
}

const mean = (values: readonly number[]): number =>
  values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
