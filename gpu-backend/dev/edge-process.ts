/** The child process in which `npm start` runs the edge. */
import { serveParent } from './children.ts';
import { type EdgeOptions, startEdge } from './local-edge.ts';

serveParent<EdgeOptions>(startEdge);
