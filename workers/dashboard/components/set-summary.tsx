/** What a mask set is, in one line of figures; and what it means that there is none. */
import { useScope } from '../context.ts';
import { percent, tenantName, when } from '../format.ts';
import type { LiveSet } from '../live-set.ts';
import { type FactList, Facts } from './facts.tsx';
import { Empty, Notice } from './notice.tsx';

export function SetSummary({ publication, set }: LiveSet) {
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

export const NothingLive = () => <Empty>No mask set is live: every request runs dense.</Empty>;
