/** One of the two answers: its text as it comes, and its speed. */
import { HEADERS } from '../../../shared/protocol.ts';
import { Failure } from '../components/notice.tsx';
import { number, percent } from '../format.ts';
import type { Progress } from './stream.ts';

export type Side =
  | { readonly state: 'idle' }
  | { readonly state: 'running' | 'done' | 'stopped'; readonly progress: Progress }
  | { readonly state: 'failed'; readonly progress: Progress; readonly error: Error };

export function Answer({ title, side }: { readonly title: string; readonly side: Side }) {
  const progress = side.state === 'idle' ? undefined : side.progress;
  const decision = progress?.decision ?? {};
  return (
    <article class="answer" aria-label={title}>
      <header>
        <h2>{title}</h2>
        <small>
          {decision[HEADERS.mask] !== undefined && (
            <>
              mask <code>{decision[HEADERS.mask]}</code>, {percent(Number(decision[HEADERS.sparsity] ?? 0))}{' '}
              of the blocks out
            </>
          )}
        </small>
      </header>
      <p class="text" aria-live="polite" aria-busy={side.state === 'running'}>
        {progress?.text}
      </p>
      {side.state === 'failed' && <Failure error={side.error} />}
      <footer>
        <small>{progress === undefined ? 'Nothing was run yet.' : speed(progress)}</small>
        {side.state === 'stopped' && <small> Stopped.</small>}
      </footer>
    </article>
  );
}

function speed({ tokens, first_ms, perToken_ms }: Progress): string {
  const first =
    first_ms === null ? 'waiting for the first token' : `first token after ${number(first_ms)} ms`;
  const rate = perToken_ms === null ? '' : `, then ${number(perToken_ms, 1)} ms a token`;
  return `${first}${rate}, ${tokens} tokens`;
}
