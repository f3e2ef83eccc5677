/** What a mask set is, in one line of figures; and what it means that there is none. */
import { useScope } from '../context.ts';
import { percent, when } from '../format.ts';
import type { LiveSet } from '../live-set.ts';
import { Empty } from './notice.tsx';

export function SetSummary({ publication, set }: LiveSet) {
  const facts: readonly (readonly [string, string])[] = [
    ['Mask set', set.name],
    ['Version', publication.version],
    ['Model', set.model.name],
    ['Encoder', `${set.encoder.id} (${set.encoder.dimensions} dimensions)`],
    ['Blocks out', `${percent(set.reachedSparsity)} (target ${percent(set.targetSparsity)})`],
    ['Surrogates', set.surrogate ? 'stand in for skipped blocks' : 'none: skipped blocks leave a hole'],
    ['Live since', when(publication.created_at)],
  ];
  return (
    <dl class="facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

export function NothingLive() {
  const { tenant } = useScope();
  return (
    <Empty>
      {tenant === ''
        ? 'No mask set is live: every request runs dense.'
        : 'This tenant has no mask set of its own: its requests use the default one.'}
    </Empty>
  );
}
