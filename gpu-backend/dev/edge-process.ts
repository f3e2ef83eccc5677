/** The child process in which `npm start` runs the edge. */
import { serveParent } from './child-protocol.ts';
import { type EdgeOptions, startEdge } from './edge.ts';

serveParent<EdgeOptions>(startEdge);
