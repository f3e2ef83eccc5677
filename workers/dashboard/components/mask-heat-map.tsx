/**
 * The mask sets in use, and masks as a heat map: one column for each layer, two rows (attention and FFN) for each mask,
 * with the clusters that share it. The last two rows show the share of the calibration set that skips each block.
 */
import type { ComponentChildren } from 'preact';
import { useMemo } from 'preact/hooks';
import { statsSchema } from '../../../shared/admin/stats-wire.ts';
import { maskFromBits } from '../../../shared/mask/mask.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { admin, edgeNow_ms, query } from '../api.ts';
import { type LiveSet, useAddress, useLiveSet, useLoad, useScope } from '../hooks.ts';
import { percent, setOwner, sharePercent, shortVersion, when } from '../look.ts';
import { groupByMask } from '../pages/figures.ts';
import { Choice } from './controls.tsx';
import { Empty, Loaded, Notice } from './dialog.tsx';
import { type FactList, Facts, Scroll } from './table.tsx';

export const LiveMasks = () => (
  <WithLiveSet>
    {({ set, publication }) => <MaskHeatMap set={set} version={publication.version} />}
  </WithLiveSet>
);

/** Shows the live mask set's figures and then `children`; or that no set is live. */
export function WithLiveSet({ children }: { readonly children: (live: LiveSet) => ComponentChildren }) {
  const [version, pick] = useAddress('version', '');
  const live = useLiveSet(version);
  return (
    <Loaded load={live}>
      {(found) =>
        found === null ? (
          <Empty>No mask set is live: every request runs dense.</Empty>
        ) : (
          <>
            <Parts live={found} onPick={pick} />
            <SetSummary {...found} />
            {children(found)}
          </>
        )
      }
    </Loaded>
  );
}

/** During a rollout several sets are in use: lists their shares, and lets the person choose which to show. */
function Parts({ live, onPick }: { readonly live: LiveSet; readonly onPick: (version: string) => void }) {
  const parts = live.publication.parts.filter(({ version }) => version !== null);
  if (parts.length < 2) return null;
  return (
    <div class="row">
      <Choice
        title="Mask set"
        value={live.publication.version}
        options={parts.map(({ version, share }) => [
          version!,
          `${shortVersion(version!)}, serving ${sharePercent(share)}`,
        ])}
        onPick={onPick}
      />
    </div>
  );
}

function SetSummary({ publication, set }: LiveSet) {
  const { tenant } = useScope();
  const part = publication.parts.find(({ version }) => version === publication.version);
  const facts: FactList = [
    ['Mask set', set.name],
    ['Version', publication.version],
    ['Serving', sharePercent(part?.share ?? 1)],
    ['Model', set.model.name],
    ['Encoder', `${set.encoder.id} (${set.encoder.dimensions} dimensions)`],
    ['Blocks skipped', `${percent(set.reachedSparsity)} (target ${percent(set.targetSparsity)})`],
    ['Surrogates', set.surrogate ? 'in place of skipped blocks' : 'none'],
    ['Live since', when(publication.activate_at)],
  ];
  return (
    <>
      {publication.tenant !== tenant && (
        <Notice kind="info">
          {setOwner(tenant)} has no mask set of its own: its requests use the default mask set, shown here.
        </Notice>
      )}
      <Facts facts={facts} />
    </>
  );
}

const KINDS = ['attention', 'FFN'] as const;
const HEAT_STEPS = 10;

type HeatRow = {
  /** One title for each cluster with this mask. */
  readonly titles: readonly string[];
  readonly detail: string;
  /** For attention and FFN a number for each layer: 0 = runs, 1 = skipped. */
  readonly heat: Heat;
};
type Heat = readonly [readonly number[], readonly number[]];

const DAY_ms = 86_400_000;

function MaskHeatMap({ set, version }: { readonly set: MaskSet; readonly version: string }) {
  const layers = Array.from({ length: set.model.blockCount / 2 }, (_, layer) => layer);
  const shares = useLiveShares(version);
  const rows = useMemo(() => heatRows(set, shares), [set, shares]);
  return (
    <>
      <Legend />
      <Scroll label="Masks of the live set">
        <table class="heat">
          <caption>
            Which blocks each cluster skips; clusters with the same mask share a row. The last rows show the
            share of calibration prompts that skip the block. Live shares are of the last 24 hours.
          </caption>
          <thead>
            <tr>
              <th scope="col">Clusters</th>
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
            <tbody key={row.titles[0]}>
              {KINDS.map((kind, index) => (
                <tr key={kind}>
                  {index === 0 && (
                    <th scope="rowgroup" rowSpan={2}>
                      {row.titles.map((title) => (
                        <span key={title}>{title}</span>
                      ))}
                      <small>{row.detail}</small>
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
    </>
  );
}

/** The legend shows the colours themselves, since the theme decides which is darker. */
const Legend = () => (
  <ul class="legend" aria-label="What the colours mean">
    {[0, 5, 10].map((step) => (
      <li key={step}>
        <span class={`swatch heat-${step}`} aria-hidden="true" />
        {step === 0 ? 'runs' : step === HEAT_STEPS ? 'skipped' : 'skipped by half of the prompts'}
      </li>
    ))}
  </ul>
);

/** One mask, by itself. `bits`: null for dense. */
export function MaskStrip({
  blockCount,
  bits,
}: {
  readonly blockCount: number;
  readonly bits: string | null;
}) {
  const heat = bits === null ? denseHeat(blockCount) : split(skippedBy(blockCount, bits));
  return (
    <>
      <Legend />
      <Scroll label="The mask">
        <table class="heat">
          <caption>Which blocks ran, by layer</caption>
          <thead>
            <tr>
              <th scope="col">Block</th>
              {heat[0].map((_, layer) => (
                <th key={layer} scope="col">
                  {layer}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {KINDS.map((kind, index) => (
              <tr key={kind}>
                <th scope="row">{kind}</th>
                {heat[index]!.map((one, layer) => (
                  <Cell key={layer} heat={one} />
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
    </>
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

/** Shares of the version's routed requests by cluster; undefined while there are none. */
function useLiveShares(version: string): ReadonlyMap<number, number> | undefined {
  const { tenant } = useScope();
  const stats = useLoad(['live shares', tenant, version], (signal) => {
    const from = new Date(edgeNow_ms() - DAY_ms).toISOString();
    return admin(statsSchema, `/stats${query({ tenant, step: 'hour', from })}`, { signal });
  });
  const found = stats.state === 'ready' ? stats.data : undefined;
  return useMemo(() => {
    const counts = new Map<number, number>();
    for (const row of found?.routing ?? []) {
      if (row.version !== version || row.cluster === null) continue;
      counts.set(row.cluster, (counts.get(row.cluster) ?? 0) + row.requests);
    }
    const total = [...counts.values()].reduce((sum, count) => sum + count, 0);
    return total === 0 ? undefined : new Map([...counts].map(([cluster, count]) => [cluster, count / total]));
  }, [found, version]);
}

const skippedBy = (blockCount: number, bits: string): number[] =>
  [...maskFromBits(blockCount, bits).runs].map((runs) => 1 - runs);
const split = (blocks: readonly number[]): Heat => [
  blocks.filter((_, block) => block % 2 === 0),
  blocks.filter((_, block) => block % 2 === 1),
];
const denseHeat = (blockCount: number): Heat => split(Array.from({ length: blockCount }, () => 0));

function heatRows(set: MaskSet, live: ReadonlyMap<number, number> | undefined): HeatRow[] {
  const { blockCount } = set.model;
  const total = set.clusters.reduce((sum, { share }) => sum + share, 0) || 1;
  const all = Array.from({ length: blockCount }, (_, block) =>
    set.clusters.reduce(
      (sum, { share, bits }) => sum + (share / total) * skippedBy(blockCount, bits)[block]!,
      0,
    ),
  );
  const sum = (values: readonly number[]) => values.reduce((one, other) => one + other, 0);
  return [
    ...groupByMask(set.clusters).map(({ members }) => {
      const labels = members.map(({ index, label }) =>
        label === undefined ? `${index}` : `${index} ${label}`,
      );
      const ofLive =
        live === undefined
          ? 'no live requests yet'
          : `${percent(sum(members.map(({ index }) => live.get(index) ?? 0)), 0)} live`;
      return {
        titles: labels,
        detail: `${percent(sum(members.map(({ share }) => share)), 0)} of calibration · ${ofLive}`,
        heat: split(skippedBy(blockCount, members[0]!.bits)),
      };
    }),
    { titles: ['All'], detail: 'weighted by prompts', heat: split(all.map((heat) => Math.min(1, heat))) },
  ];
}

const mean = (values: readonly number[]): number =>
  values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
