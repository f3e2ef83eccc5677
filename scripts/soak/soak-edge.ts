/**
 * The child process that runs the edge of a soak: the one of `npm start`, with a D1 that can be stalled, and with the memory
 * that the platform gives an isolate. V8 lets garbage stand while there is room, so a leak shows only where there is none.
 */
import { fileURLToPath } from 'node:url';
import { serveParent } from '../../gpu-backend/dev/children.ts';
import { type EdgeOptions, startEdge, V8_FLAGS } from '../../gpu-backend/dev/local-edge.ts';

const AROUND = fileURLToPath(new URL('./stallable-d1.ts', import.meta.url));

process.env.MINIFLARE_WORKERD_V8_FLAGS = `${V8_FLAGS} --max-old-space-size=128`;

serveParent((options: EdgeOptions) => startEdge({ ...options, around: AROUND }));
