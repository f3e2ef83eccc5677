/** What the tests of the edge and the servers around it agree on. */
import { maskFromSkippedLayers } from '../../../shared/mask/mask.ts';

/** What the backend serves; the tests' mask sets are for it. */
export const MODEL = { id: 'test-model', hash: 'a'.repeat(64), blockCount: 12 } as const;

/** Those of the tests' mask sets, which backends ask the edge for. */
export const TEST_MASKS = [1, 2, 3].map((layer) =>
  maskFromSkippedLayers(MODEL.blockCount, { skipAttention: [layer], skipFfn: [2] }),
);

/** The pause between two chunks of a stream. */
export const STREAM_PAUSE_ms = 150;
/** A stream whose first event is longer than the edge holds one; a byte of it that is lost or sent twice shows. */
export const LONG_WHOLE_EVENT = `data: [${Array.from({ length: 250_000 }, (_, i) => i)}]\n\ndata: [DONE]\n\n`;
/** What a backend takes at least to find out that nobody knows a mask. */
export const UNKNOWN_MASK_ms = 200;

export const BACKEND_KEY = 'test-backend-key-000000000000';
/** The backend takes this one, too: the next one of a rotation. */
export const BACKEND_KEY_2 = 'test-backend-key-222222222222';
export const ADMIN_KEY = 'test-admin-key-00000000000000';
export const EDGE_URL = 'https://edge.test';

/** What the encoder server's vectors are called at the edge. */
export const ENCODER = { id: 'test/encoder', revision: 'r1', pooling: 'mean', dimensions: 4 } as const;

/** What became of one request, as the backend server saw it: `GET /recorded/{request id}`. */
export type Recorded = {
  readonly path: string;
  /** Which of the server's backends was asked. */
  readonly place: string;
  /** All that were, in turn. */
  readonly places?: readonly string[];
  readonly headers: Record<string, string>;
  readonly body: Record<string, unknown> | null;
  /** Whether the caller hung up before the answer was complete. */
  hungUp: boolean;
  /** What a flood was let through so far. */
  sent_bytes: number;
};
