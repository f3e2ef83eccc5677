/**
 * The import rules. Data flows one way, and these rules are what keeps it so; ARCHITECTURE.md says why, and
 * test/import-rules.test.ts proves that each can fail.
 */
import { findCycle, type Import, readImports } from './import-graph.ts';

/** Patterns of files, or of `node:` and `npm:` names. */
type Side = { readonly path?: string; readonly pathNot?: string };
export type Rule = {
  readonly name: string;
  readonly why: string;
  readonly from: Side;
  readonly to: Side;
};

const forbid = (name: string, why: string, from: Side, to: Side): Rule => ({ name, why, from, to });

const ONLINE = '^gpu-backend/(api|jobs|serving|engine|encoder|onnx|model)/';
const OFFLINE = '^gpu-backend/(calibration|training|evaluation|pipeline|publication)/';
const ENTRY_POINTS = '^gpu-backend/(cli\\.ts|commands/|dev/|bench/)';

export const RULES: readonly Rule[] = [
  forbid(
    'shared-is-pure',
    'Both sides run shared/, so it knows neither of them.',
    { path: '^shared/' },
    { path: '^(workers|gpu-backend|scripts|test)/' },
  ),
  forbid(
    'shared-has-no-io',
    'shared/ computes; reading files or sockets is for the two sides.',
    { path: '^shared/' },
    { path: '^node:' },
  ),
  forbid(
    'workers-know-no-backend',
    'The edge and the backend meet in shared/protocol.ts and over HTTP only.',
    { path: '^workers/' },
    { path: '^(gpu-backend|scripts|test)/' },
  ),
  forbid(
    'backend-knows-no-workers',
    'The edge and the backend meet in shared/protocol.ts and over HTTP only.',
    { path: '^gpu-backend/' },
    { path: '^(workers|test)/' },
  ),
  forbid(
    'one-file-imports-onnxruntime',
    'One file knows the runtime, so that another runtime or version touches one file.',
    { pathNot: '^gpu-backend/onnx/session\\.ts$' },
    { path: '^npm:onnxruntime-' },
  ),
  forbid(
    'only-db-knows-columns',
    'Queries have names outside workers/db; tables and columns do not leave it.',
    { path: '^(workers|shared|gpu-backend)/', pathNot: '^workers/db/' },
    { path: '^workers/db/schema|^npm:drizzle-orm$' },
  ),
  forbid(
    'api-serving-engine',
    'A request goes api → serving → engine; nothing below knows what is above it.',
    { path: '^gpu-backend/engine/' },
    { path: '^gpu-backend/(api|serving)/' },
  ),
  forbid(
    'serving-below-api',
    'A request goes api → serving → engine; nothing below knows what is above it.',
    { path: '^gpu-backend/serving/' },
    { path: '^gpu-backend/api/' },
  ),
  forbid(
    'offline-calibration-first',
    'calibration → training → evaluation → publication: an earlier stage never needs a later one.',
    { path: '^gpu-backend/calibration/' },
    { path: '^gpu-backend/(training|evaluation|publication)/' },
  ),
  forbid(
    'offline-training-second',
    'calibration → training → evaluation → publication: an earlier stage never needs a later one.',
    { path: '^gpu-backend/training/' },
    { path: '^gpu-backend/(evaluation|publication)/' },
  ),
  forbid(
    'offline-evaluation-third',
    'calibration → training → evaluation → publication: an earlier stage never needs a later one.',
    { path: '^gpu-backend/evaluation/' },
    { path: '^gpu-backend/publication/' },
  ),
  forbid(
    'offline-pipeline-composes',
    'pipeline/ composes the stages of a learning run; no stage knows the run that it is part of.',
    { path: '^gpu-backend/(calibration|training|evaluation|publication)/' },
    { path: '^gpu-backend/pipeline/' },
  ),
  forbid(
    'serving-needs-no-learning',
    'What answers requests starts without what learns masks.',
    { path: ONLINE },
    { path: OFFLINE },
  ),
  forbid(
    'graphs-know-no-server',
    'Models and graphs are below the engine.',
    { path: '^gpu-backend/(onnx|model)/' },
    { path: '^gpu-backend/(api|serving|engine)/' },
  ),
  forbid(
    'wiring-at-entry-points',
    'Commands and the development runner compose parts; no part knows who composes it.',
    { path: '^(gpu-backend|workers|shared)/', pathNot: ENTRY_POINTS },
    { path: ENTRY_POINTS },
  ),
  forbid(
    'edge-db-below-services',
    'routes → services → db: a query does not know who asks.',
    { path: '^workers/db/' },
    { path: '^workers/(routes|services|middleware)/' },
  ),
  forbid(
    'edge-services-below-routes',
    'routes → services → db: a service does not know over which route it is reached.',
    { path: '^workers/services/' },
    { path: '^workers/(routes|app\\.ts|index\\.ts)' },
  ),
  forbid(
    'dashboard-is-a-client',
    'The page runs in a browser and meets the edge over HTTP and in shared/ only.',
    { path: '^workers/dashboard/' },
    { path: '^workers/(?!dashboard/)|^node:' },
  ),
  forbid(
    'edge-serves-the-page-unread',
    'The worker delivers the page as files; code for browsers does not get into it.',
    { path: '^workers/(?!dashboard/)' },
    { path: '^workers/dashboard/' },
  ),
  forbid(
    'no-test-code-in-the-product',
    'Tests and scripts use the product, never the other way round.',
    { path: '^(gpu-backend|workers|shared)/' },
    { path: '^(test|scripts)/' },
  ),
];

export type Violation = { readonly rule: string; readonly why: string; readonly what: string };

const isOn = ({ path, pathNot }: Side, name: string): boolean =>
  (path === undefined || new RegExp(path).test(name)) && !(pathNot && new RegExp(pathNot).test(name));

/** Every import below `folders` that breaks a rule, does not resolve, or closes a cycle. */
export function checkImports(root: string, folders: readonly string[]): Violation[] {
  const imports = readImports(root, folders);
  const arrow = ({ from, to }: Import) => `${from} → ${to}`;
  const broken = RULES.flatMap(({ name, why, from, to }) =>
    imports
      .filter((edge) => isOn(from, edge.from) && isOn(to, edge.to))
      .map((edge) => ({ rule: name, why, what: arrow(edge) })),
  );
  const dangling = imports
    .filter((edge) => !edge.resolved)
    .map((edge) => ({ rule: 'resolvable', why: 'There is no such file.', what: arrow(edge) }));
  const cycle = findCycle(imports);
  if (cycle === undefined) return [...broken, ...dangling];
  const why = 'A cycle hides which of its modules decides.';
  return [...broken, ...dangling, { rule: 'no-cycles', why, what: cycle.join(' → ') }];
}
