/**
 * Whether routing pays, as the set in use found on prompts that nothing was learned on; and whether it still holds in live
 * traffic, with a proposal to learn again where it does not.
 */
import { type Drift, driftSchema } from '../../../shared/admin/stats-wire.ts';
import { blocksLine, type Headroom, saidOfRouting, skippedLine } from '../../../shared/mask/held-out.ts';
import { admin, query } from '../api.ts';
import { Empty, Loaded, Notice } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { type LiveSet, useLiveSet, useLoad, useScope } from '../hooks.ts';
import { number, percent, shortVersion } from '../look.ts';

export function RoutingQuality() {
  const live = useLiveSet('');
  return (
    <Loaded load={live}>
      {(found) =>
        found !== null && (
          <>
            <Pays {...found} />
            <Holds version={found.publication.version} />
          </>
        )
      }
    </Loaded>
  );
}

function Pays({ set }: LiveSet) {
  const { headroom, oneMaskReason } = saidOfRouting(set);
  return (
    <section>
      <h2>Does routing pay?</h2>
      {oneMaskReason !== null && <p>All clusters share one mask: {oneMaskReason}.</p>}
      {headroom === null ? (
        <Empty>{set.name} does not say what its routing gains over one mask.</Empty>
      ) : (
        <HeadroomTable name={set.name} headroom={headroom} />
      )}
    </section>
  );
}

function HeadroomTable({ name, headroom }: { readonly name: string; readonly headroom: Headroom }) {
  const rows = [
    { what: 'one mask for all', ...headroom.oneMask },
    { what: 'as it is routed', ...headroom.routed },
    { what: 'the best mask of each prompt, known afterwards', ...headroom.bestAfterwards },
    { what: 'the best mask of each kind of prompt', ...headroom.byKind },
  ];
  type Row = (typeof rows)[number];
  return (
    <>
      <Table
        caption={`Headroom of ${headroom.masks} masks, ${name}`}
        rows={rows}
        rowKey={({ what }) => what}
        columns={[
          { title: 'Mask', cell: ({ what }) => what },
          { title: 'KL', cell: ({ kl }) => number(kl, 4), isNumber: true },
          {
            title: '95 %',
            cell: ({ interval }) => spread(interval, (value) => number(value, 4)),
            isNumber: true,
          },
          { title: 'Against one mask', cell: ({ change }: Row) => signed(change), isNumber: true },
          { title: 'its 95 %', cell: ({ changeInterval }) => spread(changeInterval, signed), isNumber: true },
        ]}
      />
      <p>
        On {headroom.rows} held-out prompts, {headroom.positions} positions.
        {headroom.blocks !== null && ` ${blocksLine(headroom.blocks)}`}
        {headroom.skipped !== undefined && ` ${skippedLine(headroom.skipped)}`}
      </p>
    </>
  );
}

const spread = (interval: readonly [number, number] | null, format: (value: number) => string): string =>
  interval === null ? '–' : `${format(interval[0])} to ${format(interval[1])}`;
const signed = (share: number): string => `${share > 0 ? '+' : ''}${percent(share)}`;

function Holds({ version }: { readonly version: string }) {
  const { tenant } = useScope();
  const drift = useLoad(['drift', tenant, version], (signal) =>
    admin(driftSchema, `/drift${query({ tenant, version })}`, { signal }),
  );
  return (
    <section>
      <h2>Does it hold in live traffic?</h2>
      <Loaded load={drift}>
        {(found) => (
          <>
            {found.proposal !== null && <Notice kind="warning">{found.proposal}</Notice>}
            <p>{farText(found)}</p>
            <Clusters {...found} />
          </>
        )}
      </Loaded>
    </section>
  );
}

function farText({ distance }: Drift): string {
  if (distance === null) return 'The set does not say how far its own prompts lay from their clusters.';
  const { samples, samples_min, far_share, low, high } = distance;
  if (far_share === null)
    return `${samples} of ${samples_min} requests that it takes were sampled to say how far they lie from the clusters.`;
  return (
    `${percent(far_share)} of ${samples} recent requests (${percent(low)} to ${percent(high)}) lie farther from every ` +
    'cluster than 95 % of the prompts that the set was made for.'
  );
}

type Mean = Drift['clusters'][number]['before'];

function Clusters({ version, clusters, pairs_min }: Drift) {
  const mean = ({ pairs, mean, low, high }: Mean) =>
    mean === null
      ? `${pairs} of ${pairs_min} comparisons`
      : `${percent(mean)} (${percent(low)} to ${percent(high)}), ${pairs}`;
  return (
    <Table
      caption={`Agreement with dense answers by cluster, ${shortVersion(version)}`}
      empty="No answer of this version was compared with a dense one yet."
      rows={clusters}
      rowKey={({ cluster }) => String(cluster)}
      columns={[
        { title: 'Cluster', cell: ({ cluster }) => cluster, isNumber: true },
        { title: 'Before', cell: ({ before }) => mean(before), isNumber: true },
        { title: 'Last day', cell: ({ recent }) => mean(recent), isNumber: true },
        { title: 'Drift', cell: ({ drifted }) => (drifted ? 'agrees less than before' : '–') },
      ]}
    />
  );
}
