/**
 * The import rules. Data flows one way, and these rules are what keeps it so; ARCHITECTURE.md says why, and
 * test/import-rules.test.ts proves that each rule can fail. TypeScript is read through swc, because
 * dependency-cruiser does not know TypeScript 7's compiler.
 */

import type { ICruiseOptions, IRegularForbiddenRuleType, IResolveOptions } from 'dependency-cruiser';

const forbid = (
  name: string,
  comment: string,
  from: IRegularForbiddenRuleType['from'],
  to: IRegularForbiddenRuleType['to'],
): IRegularForbiddenRuleType => ({ name, comment, severity: 'error', from, to });

const ONLINE = '^gpu-backend/(api|serving|engine|onnx|model)/';
const OFFLINE = '^gpu-backend/(calibration|training|evaluation|publication)/';
const ENTRY_POINTS = '^gpu-backend/(cli\\.ts|commands/|dev/|bench/)';

export const RULES: IRegularForbiddenRuleType[] = [
  forbid('no-cycles', 'A cycle hides which of two modules decides.', {}, { circular: true }),
  forbid(
    'resolvable',
    'An import that does not resolve fails only when it runs.',
    {},
    { couldNotResolve: true, pathNot: '^cloudflare:' },
  ),
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
    { dependencyTypes: ['core'] },
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
    { path: '(^|/)node_modules/onnxruntime-' },
  ),
  forbid(
    'only-db-knows-columns',
    'Queries have names outside workers/db; tables and columns do not leave it.',
    { path: '^(workers|shared|gpu-backend)/', pathNot: '^workers/db/' },
    { path: '^workers/db/schema|(^|/)node_modules/drizzle-orm/' },
  ),
  forbid(
    'api-serving-engine',
    'A request goes api → serving → engine; below, only the words of serving/engine.ts are known.',
    { path: '^gpu-backend/engine/' },
    { path: '^gpu-backend/(api|serving)/', pathNot: '^gpu-backend/serving/engine\\.ts$' },
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
    'no-test-code-in-the-product',
    'Tests and scripts use the product, never the other way round.',
    { path: '^(gpu-backend|workers|shared)/' },
    { path: '^(test|scripts)/' },
  ),
];

export const OPTIONS: ICruiseOptions = {
  parser: 'swc',
  tsPreCompilationDeps: true,
  doNotFollow: { path: 'node_modules' },
  validate: true,
  ruleSet: { forbidden: RULES },
};

export const RESOLVE_OPTIONS: Partial<IResolveOptions> = {
  exportsFields: ['exports'],
  conditionNames: ['import', 'node', 'types', 'default'],
};
