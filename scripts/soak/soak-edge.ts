/** The child process that runs the edge of a soak: the one of `npm start`, with a D1 that can be stalled. */
import { fileURLToPath } from 'node:url';
import { serveParent } from '../../gpu-backend/dev/children.ts';
import { type EdgeOptions, startEdge } from '../../gpu-backend/dev/local-edge.ts';

const AROUND = fileURLToPath(new URL('./stallable-d1.ts', import.meta.url));

serveParent((options: EdgeOptions) => startEdge({ ...options, around: AROUND }));
