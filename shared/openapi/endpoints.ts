/**
 * Every endpoint of the edge: its request, the names of its answers (`answers.ts`), and who may call it. `document.ts`
 * generates OpenAPI from it, and a test compares it with the routes of the real app.
 */
import { z } from 'zod';
import * as wire from '../admin/admin-wire.ts';
import * as experiments from '../admin/experiment-wire.ts';
import * as jobs from '../admin/job-wire.ts';
import * as publications from '../admin/publication-wire.ts';
import * as requests from '../admin/requests-wire.ts';
import * as stats from '../admin/stats-wire.ts';
import { maskSetSchema } from '../mask/mask-set.ts';
import * as backends from '../wire/backend-load.ts';
import type { ErrorCode } from '../wire/errors.ts';
import { chatRequest, completionRequest, feedbackSchema } from '../wire/openai.ts';
import { responsesRequest } from '../wire/responses.ts';
import type { AnswerName } from './answers.ts';

/**
 * Who calls: a tenant's key, an admin key (or the dashboard's session), a backend's token, the session alone, anybody.
 */
export type CallerKind = 'tenant' | 'admin' | 'backend' | 'session' | 'anybody';

export type Endpoint = {
  readonly method: 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE';
  readonly path: string;
  readonly summary: string;
  readonly more?: string;
  readonly query?: z.ZodObject;
  /** A schema of JSON, or another media type. */
  readonly body?: z.ZodType | string;
  /** Answers by status: a name in `answers.ts`, a list of it, another media type, or null for no body. */
  readonly answers: Readonly<Record<number, AnswerName | readonly [AnswerName] | MediaType | null>>;
  /** Errors in addition to those that follow from its caller, body and path. */
  readonly errors?: readonly ErrorCode[];
};
type MediaType = `${string}/${string}`;

type Group = {
  readonly tag: string;
  readonly about: string;
  readonly caller: CallerKind;
  readonly endpoints: readonly Endpoint[];
};

/* Queries, errors and texts that several have. */

const tenant = wire.tenantQuerySchema;
const page = wire.pageQuerySchema;
const tenantPage = wire.tenantPageQuerySchema;

const ROUTED: readonly ErrorCode[] = [
  ...(['model_not_found', 'model_not_allowed', 'unknown_mask', 'sparsity_over_ceiling'] as const),
  ...(['mask_model_mismatch', 'surrogates_mismatch'] as const),
];
const COMPLETED: readonly ErrorCode[] = [
  ...ROUTED,
  ...(['context_length_exceeded', 'budget_exceeded', 'queue_full', 'cancelled'] as const),
  ...(['engine_failed', 'request_fails_engine', 'backend_error', 'backend_unreachable'] as const),
  ...(['budget_unavailable'] as const),
  ...(['queue_timeout', 'deadline_exceeded'] as const),
];
const COMPLETION = `The edge picks a mask by the prompt, and the backend decodes the whole answer under it. The decision \
is in the \`x-maskroute-*\` headers and under \`maskroute\`, when streaming in the last chunk.`;
const PUBLISHING: readonly ErrorCode[] = [
  ...(['conflict', 'mask_model_mismatch', 'encoder_mismatch', 'surrogates_mismatch'] as const),
  ...(['quality_unknown', 'quality_below_floor', 'sparsity_over_ceiling'] as const),
  ...(['backend_unreachable', 'not_ready'] as const),
];

/** Errors of endpoints that forward to a backend. */
const AT_BACKEND: readonly ErrorCode[] = ['backend_unreachable', 'backend_error'];

/** Status and body: `201 Tenant`, `200 [Tenant]` for a list, `200 text/event-stream`, `204` for none. */
type Said = `${number}` | `${number} ${AnswerName}` | `${number} [${AnswerName}]` | `${number} ${MediaType}`;

/** One endpoint by its method and path. */
function on(
  name: `${Endpoint['method']} /${string}`,
  summary: string,
  said: Said | readonly Said[],
  rest: Pick<Endpoint, 'more' | 'query' | 'body' | 'errors'> = {},
): Endpoint {
  const [method, path] = name.split(' ') as [Endpoint['method'], string];
  const answers = Object.fromEntries([said].flat().map(answerOf));
  return { method, path, summary, answers, ...rest };
}

function answerOf(said: Said): [number, Endpoint['answers'][number]] {
  const [status, body] = said.split(' ') as [string, string?];
  const list = /^\[(\w+)\]$/.exec(body ?? '')?.[1];
  const answer = list === undefined ? (body ?? null) : [list];
  return [Number(status), answer as Endpoint['answers'][number]];
}

export const GROUPS: readonly Group[] = [
  {
    tag: 'Completions',
    about: "OpenAI's wire. `<model>:dense` names the unpruned model, and the body's `mask` picks any mask.",
    caller: 'tenant',
    endpoints: [
      on('POST /v1/chat/completions', 'Answer a conversation', '200 ChatCompletion', {
        body: chatRequest.schema,
        errors: COMPLETED,
        more: COMPLETION,
      }),
      on('POST /v1/completions', 'Continue a text', '200 TextCompletion', {
        body: completionRequest.schema,
        errors: COMPLETED,
        more: COMPLETION,
      }),
      on('POST /v1/responses', "Answer in OpenAI's newer wire, stateless", '200 Response', {
        body: responsesRequest.schema,
        errors: COMPLETED,
        more: COMPLETION,
      }),
      on('POST /v1/route', 'Dry run: the routing decision for a request', '200 Route', {
        body: z.union([chatRequest.schema, completionRequest.schema, responsesRequest.schema]),
        errors: ROUTED,
        more: 'Takes the body of any completions endpoint, makes the same decision, and generates nothing.',
      }),
      on('GET /v1/models', 'List the models', '200 ModelList', { errors: ['backend_unreachable'] }),
      on('GET /v1/models/{id}', 'One model', '200 Model', {
        errors: ['model_not_found', 'backend_unreachable'],
      }),
      on('POST /v1/feedback', 'Rate a completion', '201 Feedback', {
        body: feedbackSchema,
        errors: ['not_found', 'conflict'],
        more: 'One rating for each key and completion; later ones are refused.',
      }),
    ],
  },
  {
    tag: 'Health',
    about: 'Whether the edge runs, and whether it can answer.',
    caller: 'anybody',
    endpoints: [
      on('GET /healthz', 'The edge runs', '200 Health'),
      on('GET /readyz', 'The edge can answer, or why it cannot', ['200 Readiness', '503 Readiness']),
    ],
  },
  {
    tag: 'Tenants',
    about: "Tenants, their permissions and limits. A tenant's own admin key sees only its tenant.",
    caller: 'admin',
    endpoints: [
      on('POST /admin/v1/tenants', 'Make a tenant', '201 Tenant', {
        body: wire.createTenantSchema,
        errors: ['conflict'],
      }),
      on('GET /admin/v1/tenants', 'List tenants', '200 [Tenant]', { query: page }),
      on('GET /admin/v1/tenants/{id}', 'One tenant, with warnings', '200 Tenant'),
      on('PATCH /admin/v1/tenants/{id}', 'Change a tenant', '200 Tenant', {
        body: wire.updateTenantSchema,
        more: 'Takes effect everywhere within 5 s.',
      }),
      on('GET /admin/v1/tenants/{id}/budget', "Current use of a tenant's budget", '200 [BudgetUse]', {
        errors: ['budget_unavailable'],
      }),
    ],
  },
  {
    tag: 'Keys',
    about: 'Keys of clients and of administrators. Only their hashes are stored.',
    caller: 'admin',
    endpoints: [
      on('POST /admin/v1/keys', 'Make a key', '201 CreatedKey', {
        body: wire.createKeySchema,
        errors: ['not_found', 'conflict'],
        more: 'The answer is the only place where the key is shown.',
      }),
      on('GET /admin/v1/keys', 'List keys', '200 [ApiKey]', { query: wire.keysQuerySchema }),
      on('POST /admin/v1/keys/{id}/rotate', 'Rotate a key', '201 CreatedKey', {
        body: wire.rotateKeySchema,
        errors: ['conflict'],
        more: 'The old key and its sessions end at once, or after the time in the body.',
      }),
      on('DELETE /admin/v1/keys/{id}', 'Revoke a key', '200 ApiKey', {
        more: 'Its dashboard sessions end, too. May be repeated.',
      }),
      on('DELETE /admin/v1/keys/{id}/sessions', "End a key's dashboard sessions", '200 EndedSessions', {
        more: 'Ends all of them, everywhere within 5 s.',
      }),
      on('DELETE /admin/v1/sessions', 'End the dashboard sessions of the calling key', '200 EndedSessions'),
    ],
  },
  {
    tag: 'Mask sets',
    about: 'Immutable, named by their content.',
    caller: 'admin',
    endpoints: [
      on('POST /admin/v1/mask-sets', 'Store a mask set', ['200 MaskSetSummary', '201 MaskSetSummary'], {
        query: publications.storeMaskSetQuerySchema,
        body: maskSetSchema,
        errors: ['invalid_mask_set', ...PUBLISHING],
        more: 'Returns 200 when the same content is already stored.',
      }),
      on('GET /admin/v1/mask-sets', 'List mask sets', '200 [MaskSetSummary]', { query: tenantPage }),
      on('GET /admin/v1/mask-sets/{version}', 'One mask set', '200 MaskSet', { query: tenant }),
      on(
        'PUT /admin/v1/mask-sets/{version}/evaluation',
        'Store its evaluation by `maskroute evaluate`',
        '200 [EvaluatedRow]',
        { query: tenant, body: stats.evaluationFiguresSchema, errors: ['conflict'] },
      ),
      on('GET /admin/v1/mask-sets/{version}/evaluation', 'Its evaluation', '200 [EvaluatedRow]', {
        query: tenant,
        errors: ['conflict'],
      }),
    ],
  },
  {
    tag: 'Publications',
    about: 'Which version is live, its history, and how to change it.',
    caller: 'admin',
    endpoints: [
      on('POST /admin/v1/publications', 'Make a version live', ['200 PublishCheck', '201 Publication'], {
        body: publications.publishSchema,
        errors: ['not_found', ...PUBLISHING],
        more: 'At once, at a given time, or in steps; with `activate: false` it only checks whether it could.',
      }),
      on('POST /admin/v1/publications/rollback', 'Roll back to the previous version', '201 Publication', {
        body: publications.changeLiveSchema,
        errors: ['not_found', 'conflict'],
        more: 'Cancels a first publication whose rollout is not complete.',
      }),
      on('POST /admin/v1/publications/pause', 'Pause a rollout', '201 Publication', {
        body: publications.changeLiveSchema,
        errors: ['not_found', 'conflict'],
      }),
      on('POST /admin/v1/publications/resume', 'Resume a rollout', '201 Publication', {
        body: publications.changeLiveSchema,
        errors: ['not_found', 'conflict'],
      }),
      on(
        'GET /admin/v1/publications/comparison',
        'Errors and speed of the newest version and of the version that it replaces',
        '200 ReleaseComparison',
        { query: tenant, errors: ['not_found'] },
      ),
      on('GET /admin/v1/publications', 'The history, newest first', '200 [Publication]', {
        query: publications.publicationsQuerySchema,
      }),
      on('GET /admin/v1/publications/live', 'What is live', '200 LivePublication', {
        query: tenant,
        errors: ['not_found'],
      }),
      on(
        'GET /admin/v1/publications/in-use',
        "Versions in use for a tenant's requests",
        '200 PublicationInUse',
        { query: tenant, errors: ['not_found'] },
      ),
    ],
  },
  {
    tag: 'Experiments',
    about:
      'Mask sets compared on live requests. A draft can be changed; a started experiment can only be stopped.',
    caller: 'admin',
    endpoints: [
      on('POST /admin/v1/experiments', 'Draft an experiment', '201 Experiment', {
        body: experiments.createExperimentSchema,
        errors: ['not_found', 'conflict'],
      }),
      on('GET /admin/v1/experiments', 'List experiments', '200 [Experiment]', { query: tenantPage }),
      on('GET /admin/v1/experiments/{id}', 'One experiment', '200 Experiment', {
        query: tenant,
        errors: ['conflict'],
      }),
      on('PATCH /admin/v1/experiments/{id}', 'Change a draft', '200 Experiment', {
        query: tenant,
        body: experiments.changeExperimentSchema,
        errors: ['conflict'],
      }),
      on('DELETE /admin/v1/experiments/{id}', 'Delete a draft', '200 Experiment', {
        query: tenant,
        errors: ['conflict'],
      }),
      on('POST /admin/v1/experiments/{id}/start', 'Start it', '200 Experiment', {
        query: tenant,
        errors: ['conflict'],
        more: 'An experiment that overlaps with a running one is refused with its name.',
      }),
      on('POST /admin/v1/experiments/{id}/stop', 'Stop it', '200 Experiment', {
        query: tenant,
        errors: ['conflict'],
      }),
      on('GET /admin/v1/experiments/{id}/results', 'Results of an experiment', '200 ExperimentResults', {
        query: experiments.resultsQuerySchema,
        errors: ['conflict'],
      }),
    ],
  },
  {
    tag: 'Figures',
    about: 'Usage and statistics. They lag by some seconds.',
    caller: 'admin',
    endpoints: [
      on('GET /admin/v1/usage', 'Requests and tokens used', '200 [UsageRow]', {
        query: fieldsOf(wire.usageQuerySchema),
      }),
      on('GET /admin/v1/stats', 'Errors, times and shares by mask, over time', '200 Stats', {
        query: fieldsOf(stats.statsQuerySchema),
      }),
      on('GET /admin/v1/traffic', 'Positions of recent requests among the clusters', '200 [TrafficSample]', {
        query: stats.trafficQuerySchema,
      }),
      on('GET /admin/v1/drift', "Drift of a mask set's requests and answers", '200 Drift', {
        query: stats.driftQuerySchema,
      }),
      on('GET /admin/v1/requests', 'List requests, newest first', '200 [SeenRequest]', {
        query: fieldsOf(requests.requestsQuerySchema),
      }),
      on('GET /admin/v1/requests/{id}', 'One request, with its decision', '200 RequestDetail', {
        query: tenant,
      }),
      on('GET /admin/v1/ratings', 'Ratings, with their comments', '200 [Rated]', {
        query: fieldsOf(requests.ratingsQuerySchema),
      }),
      on('GET /admin/v1/models', 'The models that backends serve', '200 [ModelName]', {
        errors: ['backend_unreachable'],
      }),
    ],
  },
  {
    tag: 'Backends',
    about:
      'The registry of backends, and the jobs that learn masks on them. For administrators of all tenants.',
    caller: 'admin',
    endpoints: [
      on('POST /admin/v1/backends', 'Add a backend', '201 BackendEntry', {
        body: backends.createBackendSchema,
        errors: ['conflict'],
      }),
      on(
        'GET /admin/v1/backends',
        'List backends, with their state as the edge sees it',
        '200 [BackendEntry]',
        {
          query: wire.searchQuerySchema,
          more: 'If the registry is empty, it lists the backend of `BACKEND_URL`.',
        },
      ),
      on('GET /admin/v1/backends/{id}', 'One backend', '200 BackendEntry'),
      on('PATCH /admin/v1/backends/{id}', 'Change a backend', '200 BackendEntry', {
        body: backends.updateBackendSchema,
      }),
      on('DELETE /admin/v1/backends/{id}', 'Remove a backend', '200 Deleted'),
      on('GET /admin/v1/backends/{id}/jobs', 'List its jobs', '200 [Job]', {
        query: wire.searchQuerySchema,
        errors: AT_BACKEND,
      }),
      on(
        'POST /admin/v1/backends/{id}/jobs',
        'Start a job that learns masks while the backend serves',
        '202 Job',
        {
          body: jobs.createEdgeJobSchema,
          errors: ['queue_full', ...AT_BACKEND],
        },
      ),
      on('GET /admin/v1/backends/{id}/jobs/data', 'List uploaded data', '200 [UploadedData]', {
        errors: AT_BACKEND,
      }),
      on(
        'POST /admin/v1/backends/{id}/jobs/data',
        'Upload data for jobs',
        ['200 UploadedData', '201 UploadedData'],
        {
          query: jobs.uploadQuerySchema,
          body: 'application/jsonl',
          errors: ['invalid_data', ...AT_BACKEND],
        },
      ),
      on(
        'GET /admin/v1/backends/{id}/jobs/schedules',
        'List its schedules (recurring jobs)',
        '200 [Schedule]',
        { errors: AT_BACKEND },
      ),
      on('POST /admin/v1/backends/{id}/jobs/schedules', 'Schedule a recurring job', '201 Schedule', {
        body: jobs.createEdgeScheduleSchema,
        errors: ['queue_full', ...AT_BACKEND],
        more: 'With `publish`, each job publishes to this edge with the admin key, by its rollout and bounds. The backend stores the key encrypted.',
      }),
      on('GET /admin/v1/backends/{id}/jobs/schedules/{schedule}', 'One schedule', '200 Schedule', {
        errors: AT_BACKEND,
      }),
      on(
        'DELETE /admin/v1/backends/{id}/jobs/schedules/{schedule}',
        'Delete a schedule; its jobs stay',
        '200 Deleted',
        { errors: AT_BACKEND },
      ),
      on('GET /admin/v1/backends/{id}/jobs/{job}', 'One job', '200 Job', { errors: AT_BACKEND }),
      on('GET /admin/v1/backends/{id}/jobs/{job}/events', 'Follow a job', '200 text/event-stream', {
        errors: AT_BACKEND,
        more: 'Server-sent events, each a whole job; the stream ends with the job.',
      }),
      on('POST /admin/v1/backends/{id}/jobs/{job}/cancel', 'Cancel a job', '200 Job', { errors: AT_BACKEND }),
      on(
        'POST /admin/v1/backends/{id}/jobs/{job}/store',
        'Store what a job learned',
        ['200 MaskSetSummary', '201 MaskSetSummary'],
        { body: jobs.storeJobSchema, errors: ['conflict', ...AT_BACKEND] },
      ),
    ],
  },
  {
    tag: 'Audit log',
    about:
      "The log of administrators' changes: who, what, from where, before and after. A tenant's own key sees only its tenant's.",
    caller: 'admin',
    endpoints: [
      on('GET /admin/v1/audit', 'List changes, newest first', '200 [AuditEntry]', {
        query: tenantPage,
      }),
      on(
        'GET /admin/v1/audit/export',
        'Export the whole log, one entry per line',
        '200 application/x-ndjson',
        {
          query: tenant,
        },
      ),
      on('GET /admin/v1/audit/{id}', 'Show one change', '200 AuditEntry', { query: tenant }),
    ],
  },
  {
    tag: 'Dashboard',
    about: 'The session of the page at `/dashboard`: a cookie in place of an admin key.',
    caller: 'session',
    endpoints: [
      on('POST /dashboard/session', 'Log in', '200 Session', { body: wire.loginSchema }),
      on('GET /dashboard/session', 'Who is logged in', ['200 Session', '204'], {
        more: '204 when nobody is logged in, 401 when the session has ended.',
      }),
      on('DELETE /dashboard/session', 'Log out', '204', {
        query: wire.logoutQuerySchema,
        more: 'Ends the session, with `everywhere=true` all sessions of its key. Takes effect everywhere within 5 s.',
      }),
      on('GET /dashboard/sign-in', 'Sign in with the OpenID Connect provider', '302', {
        errors: ['not_found'],
        more: 'Redirects to the provider, if one is configured.',
      }),
      on('GET /dashboard/sign-in/callback', 'The redirect URI for the provider', '302', {
        errors: ['not_found'],
      }),
    ],
  },
  {
    tag: 'For backends',
    about: 'Requests of backends to the edge.',
    caller: 'backend',
    endpoints: [on('GET /internal/v1/masks/{id}', 'The bits of a mask id', '200 MaskRecord')],
  },
];

/** The object schema of a query, without transformations. */
function fieldsOf(schema: z.ZodType): z.ZodObject {
  let inner: z.ZodType = schema;
  while (inner instanceof z.ZodPipe) inner = inner.in as z.ZodType;
  return inner as z.ZodObject;
}
