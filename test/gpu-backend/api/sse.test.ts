/** The body of a stream, apart from any server. */
import { expect, it, vi } from 'vitest';
import { sseBody } from '../../../gpu-backend/api/sse.ts';

const quiet = { keepalive_ms: 60_000, stall_ms: 60_000, onStall: () => {}, onCancel: () => {} };

it('a source gets to its end, though the client is gone before it reads anything', async () => {
  const ended = vi.fn();
  async function* frames() {
    try {
      yield 'data: 1\n\n';
    } finally {
      ended();
    }
  }
  await sseBody(frames(), quiet).cancel();
  await vi.waitFor(() => expect(ended).toHaveBeenCalledOnce(), 20_000);
});
