/**
 * Every endpoint of the edge: what it takes, what it answers, and who may ask. `document.ts` makes OpenAPI of it, and a
 * test holds it against the routes of the real app.
 */
import { z } from 'zod';
import * as wire from '../admin/admin-wire.ts';
import { auditEntrySchema } from '../admin/audit-wire.ts';
import * as experiments from '../admin/experiment-wire.ts';
import * as jobs from '../admin/job-wire.ts';
import * as publications from '../admin/publication-wire.ts';
import * as requests from '../admin/requests-wire.ts';
import * as stats from '../admin/stats-wire.ts';
import { maskSetSchema } from '../mask/mask-set.ts';
import * as backends from '../wire/backend-load.ts';
import type { ErrorCode } from '../wire/errors.ts';
import { chatRequest, completionRequest, dryRunSchema, feedbackSchema } from '../wire/openai.ts';
import { maskRecordSchema, modelListSchema, routeEchoSchema } from '../wire/protocol.ts';
import { responsesRequest } from '../wire/responses.ts';

/** Who asks: a tenant's key, an admin key (or the dashboard's session), a backend's token, the session alone, anybody. */
export type CallerKind = 'tenant' | 'admin' | 'backend' | 'session' | 'anybody';

export type Endpoint = {
  readonly method: 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE';
  readonly path: string;
  readonly summary: string;
  readonly more?: string;
  readonly query?: z.ZodObject;
  /** JSON by a schema, or another media type. */
  readonly body?: z.ZodType | string;
  /** By status: a name in {@link ANSWERS}, a list of it, another media type, or nothing. */
  readonly answers: Readonly<Record<number, AnswerName | readonly [AnswerName] | MediaType | null>>;
  /** Beside those that its caller, body and path bring. */
  readonly errors?: readonly ErrorCode[];
};
type MediaType = `${string}/${string}`;

export type Group = {
  readonly tag: string;
  readonly about: string;
  readonly caller: CallerKind;
  readonly endpoints: readonly Endpoint[];
};

/* Answers. */

const usage = z.looseObject({
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
  total_tokens: z.int(),
  prompt_tokens_details: z.looseObject({ cached_tokens: z.int() }),
});
const maskrouteInfo = routeEchoSchema.extend({
  mask: z.string(),
  sparsity: z.number(),
  queue_ms: z.number(),
  prefill_ms: z.number(),
  decode_ms: z.number(),
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
});
const finishReason = z.string().nullable();
const answer = <Choice extends z.ZodRawShape>(object: string, choice: Choice) =>
  z.looseObject({
    id: z.string(),
    object: z.literal(object),
    created: z.int(),
    model: z.string(),
    system_fingerprint: z.string(),
    choices: z.array(z.looseObject({ index: z.int(), finish_reason: finishReason, ...choice })),
    usage,
    maskroute: maskrouteInfo,
  });

const response = z.looseObject({
  id: z.string(),
  object: z.literal('response'),
  created_at: z.int(),
  status: z.string(),
  model: z.string(),
  output: z.array(z.looseObject({ id: z.string(), type: z.string() })),
  usage: z.looseObject({ input_tokens: z.int(), output_tokens: z.int(), total_tokens: z.int() }).nullable(),
});

const checks = z.record(z.string(), z.string());

export const ANSWERS = {
  ApiKey: wire.apiKeySchema,
  AuditEntry: auditEntrySchema,
  BackendEntry: backends.backendSchema,
  BudgetUse: wire.budgetUseSchema,
  ChatCompletion: answer('chat.completion', {
    message: z.looseObject({ role: z.literal('assistant'), content: z.string().nullable() }),
  }),
  CreatedKey: wire.createdKeySchema,
  Deleted: wire.deletedSchema,
  EndedSessions: wire.endedSessionsSchema,
  Drift: stats.driftSchema,
  EvaluatedRow: stats.evaluatedRowSchema,
  Experiment: experiments.experimentSchema,
  ExperimentResults: experiments.experimentResultsSchema,
  Feedback: z.object({ object: z.literal('maskroute.feedback'), id: z.string(), rating: z.int() }),
  Health: z.object({ status: z.literal('live') }),
  Job: jobs.jobSchema,
  LivePublication: publications.livePublicationSchema,
  MaskRecord: maskRecordSchema,
  MaskSet: maskSetSchema,
  MaskSetSummary: publications.maskSetSummarySchema,
  Model: modelListSchema.shape.data.element,
  ModelList: modelListSchema,
  ModelName: z.object({ id: z.string() }),
  Publication: publications.publicationSchema,
  PublicationInUse: publications.publicationInUseSchema,
  PublishCheck: publications.publishCheckSchema,
  Rated: requests.ratedSchema,
  Readiness: z.object({
    status: z.enum(['ready', 'not_ready']),
    checks,
    routing_table_age_s: z.int().nullable(),
  }),
  ReleaseComparison: stats.releaseComparisonSchema,
  RequestDetail: requests.requestDetailSchema,
  Response: response,
  Route: dryRunSchema,
  Schedule: jobs.scheduleSchema,
  SeenRequest: requests.seenRequestSchema,
  Session: wire.sessionSchema,
  Stats: stats.statsSchema,
  Tenant: wire.tenantSchema,
  TextCompletion: answer('text_completion', { text: z.string() }),
  TrafficSample: stats.trafficSampleSchema,
  UploadedData: jobs.uploadedDataSchema,
  UsageRow: wire.usageRowSchema,
} as const satisfies Record<string, z.ZodType>;
export type AnswerName = keyof typeof ANSWERS;

/* Queries. */

const tenant = z.object({
  tenant: z.string().optional().meta({ description: 'Whose; absent or empty: those of no tenant' }),
});
const page = wire.pageQuerySchema;
const tenantPage = page.extend(tenant.shape);

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
stands in the \`x-maskroute-*\` headers and under \`maskroute\`, when streaming in the last chunk.`;
const PUBLISHING: readonly ErrorCode[] = [
  ...(['conflict', 'mask_model_mismatch', 'encoder_mismatch', 'surrogates_mismatch'] as const),
  ...(['quality_unknown', 'quality_below_floor', 'sparsity_over_ceiling', 'model_not_allowed'] as const),
];

export const GROUPS: readonly Group[] = [
  {
    tag: 'Completions',
    about: "OpenAI's wire. `<model>:dense` names the unpruned model, and the body's `mask` picks any mask.",
    caller: 'tenant',
    endpoints: [
      {
        ...{
          method: 'POST',
          path: '/v1/chat/completions',
          summary: 'Answer a conversation',
          more: COMPLETION,
        },
        body: chatRequest.schema,
        answers: { 200: 'ChatCompletion' },
        errors: COMPLETED,
      },
      {
        ...{ method: 'POST', path: '/v1/completions', summary: 'Continue a text', more: COMPLETION },
        body: completionRequest.schema,
        answers: { 200: 'TextCompletion' },
        errors: COMPLETED,
      },
      {
        ...{ method: 'POST', path: '/v1/responses', summary: "Answer in OpenAI's newer wire, stateless" },
        more: COMPLETION,
        body: responsesRequest.schema,
        answers: { 200: 'Response' },
        errors: COMPLETED,
      },
      {
        ...{ method: 'POST', path: '/v1/route', summary: 'Tell where a request would go' },
        more: 'Takes the body of either endpoint of completions, decides as they do, and generates nothing.',
        body: z.union([chatRequest.schema, completionRequest.schema]),
        answers: { 200: 'Route' },
        errors: ROUTED,
      },
      { method: 'GET', path: '/v1/models', summary: 'List the models', answers: { 200: 'ModelList' } },
      {
        ...{ method: 'GET', path: '/v1/models/{id}', summary: 'One model', answers: { 200: 'Model' } },
        errors: ['model_not_found', 'backend_unreachable'],
      },
      {
        ...{ method: 'POST', path: '/v1/feedback', summary: 'Rate a completion', body: feedbackSchema },
        more: 'Once a key and completion; later ratings change nothing.',
        answers: { 201: 'Feedback' },
        errors: ['not_found'],
      },
    ],
  },
  {
    tag: 'Health',
    about: 'Whether the edge runs, and whether it can answer.',
    caller: 'anybody',
    endpoints: [
      { method: 'GET', path: '/healthz', summary: 'The edge runs', answers: { 200: 'Health' } },
      {
        ...{ method: 'GET', path: '/readyz', summary: 'The edge can answer, or why it cannot' },
        answers: { 200: 'Readiness', 503: 'Readiness' },
      },
    ],
  },
  {
    tag: 'Tenants',
    about:
      "Whose requests there are, what they may do and how much. A tenant's own admin key sees its tenant only.",
    caller: 'admin',
    endpoints: [
      {
        ...{
          method: 'POST',
          path: '/admin/v1/tenants',
          summary: 'Make a tenant',
          body: wire.createTenantSchema,
        },
        answers: { 201: 'Tenant' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/tenants', summary: 'List tenants', query: page },
        answers: { 200: ['Tenant'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/tenants/{id}', summary: 'One tenant, with warnings' },
        answers: { 200: 'Tenant' },
      },
      {
        ...{ method: 'PATCH', path: '/admin/v1/tenants/{id}', summary: 'Change a tenant' },
        more: 'Holds everywhere within 5 s.',
        body: wire.updateTenantSchema,
        answers: { 200: 'Tenant' },
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/tenants/{id}/budget',
          summary: 'What of its budget is used now',
        },
        answers: { 200: ['BudgetUse'] },
        errors: ['budget_unavailable'],
      },
    ],
  },
  {
    tag: 'Keys',
    about: 'Keys of clients and of administrators. Only their hashes are kept.',
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'POST', path: '/admin/v1/keys', summary: 'Make a key', body: wire.createKeySchema },
        more: 'The answer is the only place where the key is shown.',
        answers: { 201: 'CreatedKey' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/keys', summary: 'List keys' },
        query: wire.keysQuerySchema.extend(tenant.shape),
        answers: { 200: ['ApiKey'] },
      },
      {
        ...{ method: 'POST', path: '/admin/v1/keys/{id}/rotate', summary: 'Put a new key in place of one' },
        more: 'The old key and its sessions end, at once or after the time that the body gives.',
        body: wire.rotateKeySchema,
        answers: { 201: 'CreatedKey' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'DELETE', path: '/admin/v1/keys/{id}', summary: 'Revoke a key' },
        more: 'Its dashboard sessions end, too. Again is the same.',
        answers: { 200: 'ApiKey' },
      },
      {
        ...{
          method: 'DELETE',
          path: '/admin/v1/keys/{id}/sessions',
          summary: "End a key's dashboard sessions",
        },
        more: 'All of them, within 5 s.',
        answers: { 200: 'EndedSessions' },
      },
      {
        ...{
          method: 'DELETE',
          path: '/admin/v1/sessions',
          summary: 'End the dashboard sessions of the key that asks',
        },
        answers: { 200: 'EndedSessions' },
      },
    ],
  },
  {
    tag: 'Mask sets',
    about: 'Immutable, named by their content.',
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'POST', path: '/admin/v1/mask-sets', summary: 'Store a mask set', query: tenant },
        more: 'Content that is already there keeps its version, and the status is 200.',
        body: maskSetSchema,
        answers: { 200: 'MaskSetSummary', 201: 'MaskSetSummary' },
        errors: ['invalid_mask_set', 'conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/mask-sets', summary: 'List mask sets', query: tenantPage },
        answers: { 200: ['MaskSetSummary'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/mask-sets/{version}', summary: 'One mask set', query: tenant },
        answers: { 200: 'MaskSet' },
      },
      {
        ...{ method: 'PUT', path: '/admin/v1/mask-sets/{version}/evaluation', query: tenant },
        summary: 'Keep what `maskroute evaluate` measured of it',
        body: stats.evaluationFiguresSchema,
        answers: { 200: ['EvaluatedRow'] },
        errors: ['conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/mask-sets/{version}/evaluation', query: tenant },
        summary: 'What was measured of it',
        answers: { 200: ['EvaluatedRow'] },
      },
    ],
  },
  {
    tag: 'Publications',
    about: 'Which version is live, how it came to be, and how to change it.',
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'POST', path: '/admin/v1/publications', summary: 'Make a version live' },
        more: 'At once, at a time, or in steps; with `activate: false` it only checks that it could.',
        body: publications.publishSchema,
        answers: { 200: 'PublishCheck', 201: 'Publication' },
        errors: ['not_found', ...PUBLISHING],
      },
      {
        ...{
          method: 'POST',
          path: '/admin/v1/publications/rollback',
          summary: 'Go back to what was live before',
        },
        more: 'A first publication that not everyone sees yet is called off.',
        body: publications.rollbackSchema,
        answers: { 201: 'Publication' },
        errors: ['not_found', ...PUBLISHING],
      },
      {
        ...{ method: 'POST', path: '/admin/v1/publications/pause', summary: 'Let a rollout stand still' },
        body: publications.holdSchema,
        answers: { 201: 'Publication' },
        errors: ['not_found', 'conflict'],
      },
      {
        ...{ method: 'POST', path: '/admin/v1/publications/resume', summary: 'Let it go on' },
        body: publications.holdSchema,
        answers: { 201: 'Publication' },
        errors: ['not_found', 'conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/publications/comparison', query: tenant },
        summary: 'Errors and speed of the version that comes and of the one before it',
        answers: { 200: 'ReleaseComparison' },
        errors: ['not_found'],
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/publications',
          summary: 'The history, newest first',
          query: tenantPage,
        },
        answers: { 200: ['Publication'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/publications/live', summary: 'What is live', query: tenant },
        answers: { 200: 'LivePublication' },
        errors: ['not_found'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/publications/in-use', query: tenant },
        summary: "What a tenant's requests are routed by",
        answers: { 200: 'PublicationInUse' },
        errors: ['not_found'],
      },
    ],
  },
  {
    tag: 'Experiments',
    about: 'Mask sets compared on live requests. A draft can be changed; what was started is only stopped.',
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'POST', path: '/admin/v1/experiments', summary: 'Draft an experiment' },
        body: experiments.createExperimentSchema,
        answers: { 201: 'Experiment' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/experiments', summary: 'List experiments', query: tenantPage },
        answers: { 200: ['Experiment'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/experiments/{id}', summary: 'One experiment', query: tenant },
        answers: { 200: 'Experiment' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'PATCH', path: '/admin/v1/experiments/{id}', summary: 'Change a draft', query: tenant },
        body: experiments.changeExperimentSchema,
        answers: { 200: 'Experiment' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'DELETE', path: '/admin/v1/experiments/{id}', summary: 'Delete a draft', query: tenant },
        answers: { 200: 'Experiment' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'POST', path: '/admin/v1/experiments/{id}/start', summary: 'Start it', query: tenant },
        more: 'An experiment that overlaps with a running one is refused with its name.',
        answers: { 200: 'Experiment' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'POST', path: '/admin/v1/experiments/{id}/stop', summary: 'Stop it', query: tenant },
        answers: { 200: 'Experiment' },
        errors: ['conflict'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/experiments/{id}/results', summary: 'What came of it' },
        query: tenant.extend({ region: z.string().optional() }),
        answers: { 200: 'ExperimentResults' },
        errors: ['conflict'],
      },
    ],
  },
  {
    tag: 'Figures',
    about: 'What was counted behind the requests. It lags by some seconds.',
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'GET', path: '/admin/v1/usage', summary: 'Requests and tokens used' },
        query: fieldsOf(wire.usageQuerySchema),
        answers: { 200: ['UsageRow'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/stats', summary: 'Errors, times and shares by mask, over time' },
        query: fieldsOf(stats.statsQuerySchema),
        answers: { 200: 'Stats' },
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/traffic',
          summary: 'Where recent requests lay among the clusters',
        },
        query: stats.trafficQuerySchema,
        answers: { 200: ['TrafficSample'] },
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/drift',
          summary: 'Whether requests and answers of a mask set are still as they were',
        },
        query: stats.driftQuerySchema,
        answers: { 200: 'Drift' },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/requests', summary: 'Requests one by one, the latest first' },
        query: fieldsOf(requests.requestsQuerySchema),
        answers: { 200: ['SeenRequest'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/requests/{id}', summary: 'One request, with its decision' },
        query: tenant,
        answers: { 200: 'RequestDetail' },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/ratings', summary: 'Ratings, with their comments' },
        query: fieldsOf(requests.ratingsQuerySchema),
        answers: { 200: ['Rated'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/models', summary: 'The models that backends serve' },
        answers: { 200: ['ModelName'] },
      },
    ],
  },
  {
    tag: 'Backends',
    about:
      'The registry of backends, and the jobs that learn masks on them. For those who administrate everything.',
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'POST', path: '/admin/v1/backends', summary: 'Add a backend' },
        body: backends.createBackendSchema,
        answers: { 201: 'BackendEntry' },
        errors: ['conflict'],
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/backends',
          summary: 'List backends, with what the edge knows of each',
        },
        more: 'An empty registry lists what `BACKEND_URL` stands for.',
        query: wire.searchQuerySchema,
        answers: { 200: ['BackendEntry'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/backends/{id}', summary: 'One backend' },
        answers: { 200: 'BackendEntry' },
      },
      {
        ...{ method: 'PATCH', path: '/admin/v1/backends/{id}', summary: 'Change a backend' },
        body: backends.updateBackendSchema,
        answers: { 200: 'BackendEntry' },
      },
      {
        ...{ method: 'DELETE', path: '/admin/v1/backends/{id}', summary: 'Take a backend out' },
        answers: { 200: 'Deleted' },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/backends/{id}/jobs', summary: 'List its jobs' },
        query: wire.searchQuerySchema,
        answers: { 200: ['Job'] },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{
          method: 'POST',
          path: '/admin/v1/backends/{id}/jobs',
          summary: 'Learn masks there while it serves',
        },
        body: jobs.createEdgeJobSchema,
        answers: { 202: 'Job' },
        errors: ['queue_full', 'backend_unreachable', 'backend_error'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/backends/{id}/jobs/data', summary: 'List uploaded data' },
        answers: { 200: ['UploadedData'] },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{ method: 'POST', path: '/admin/v1/backends/{id}/jobs/data', summary: 'Upload data for jobs' },
        query: z.object({ name: z.string().regex(jobs.DATA_NAME_PATTERN).default('data') }),
        body: 'application/jsonl',
        answers: { 201: 'UploadedData' },
        errors: ['invalid_data', 'backend_unreachable', 'backend_error'],
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/backends/{id}/jobs/schedules',
          summary: 'List its schedules: jobs that come again',
        },
        answers: { 200: ['Schedule'] },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{
          method: 'POST',
          path: '/admin/v1/backends/{id}/jobs/schedules',
          summary: 'Learn there again and again',
        },
        more: 'With `publish`, each job publishes at this edge with the admin key, in the steps and within the bounds that it names. The backend keeps the key sealed.',
        body: jobs.createEdgeScheduleSchema,
        answers: { 201: 'Schedule' },
        errors: ['queue_full', 'backend_unreachable', 'backend_error'],
      },
      {
        ...{
          method: 'GET',
          path: '/admin/v1/backends/{id}/jobs/schedules/{schedule}',
          summary: 'One schedule',
        },
        answers: { 200: 'Schedule' },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{
          method: 'DELETE',
          path: '/admin/v1/backends/{id}/jobs/schedules/{schedule}',
          summary: 'End a schedule; its jobs stay',
        },
        answers: { 200: 'Deleted' },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/backends/{id}/jobs/{job}', summary: 'One job' },
        answers: { 200: 'Job' },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{ method: 'GET', path: '/admin/v1/backends/{id}/jobs/{job}/events', summary: 'Follow a job' },
        more: 'Server-sent events, each a whole job; the stream ends with the job.',
        answers: { 200: 'text/event-stream' },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{ method: 'POST', path: '/admin/v1/backends/{id}/jobs/{job}/cancel', summary: 'Cancel a job' },
        answers: { 200: 'Job' },
        errors: ['backend_unreachable', 'backend_error'],
      },
      {
        ...{
          method: 'POST',
          path: '/admin/v1/backends/{id}/jobs/{job}/store',
          summary: 'Store what a job learned',
        },
        body: jobs.storeJobSchema,
        answers: { 200: 'MaskSetSummary', 201: 'MaskSetSummary' },
        errors: ['conflict', 'backend_unreachable', 'backend_error'],
      },
    ],
  },
  {
    tag: 'Audit log',
    about:
      "What administrators changed: who, what, from where, before and after. A tenant's own key sees its tenant's.",
    caller: 'admin',
    endpoints: [
      {
        ...{ method: 'GET', path: '/admin/v1/audit', summary: 'List changes, the newest first' },
        query: tenantPage.extend({ q: z.string().optional() }),
        answers: { 200: ['AuditEntry'] },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/audit/export', summary: 'All of it, an entry a line' },
        query: tenant,
        answers: { 200: 'application/x-ndjson' },
      },
      {
        ...{ method: 'GET', path: '/admin/v1/audit/{id}', summary: 'Show one change', query: tenant },
        answers: { 200: 'AuditEntry' },
      },
    ],
  },
  {
    tag: 'Dashboard',
    about: 'The session of the page at `/dashboard`: a cookie in place of an admin key.',
    caller: 'session',
    endpoints: [
      {
        ...{ method: 'POST', path: '/dashboard/session', summary: 'Log in', body: wire.loginSchema },
        answers: { 200: 'Session' },
      },
      {
        ...{ method: 'GET', path: '/dashboard/session', summary: 'Who is logged in' },
        answers: { 200: 'Session', 204: null },
      },
      {
        ...{ method: 'DELETE', path: '/dashboard/session', summary: 'Log out' },
        query: z.object({ everywhere: z.enum(['true']).optional() }),
        answers: { 204: null },
      },
      {
        ...{
          method: 'GET',
          path: '/dashboard/sign-in',
          summary: 'Sign in at the provider of OpenID Connect',
        },
        more: 'Leads to the provider, where one is configured.',
        answers: { 302: null },
      },
      {
        ...{
          method: 'GET',
          path: '/dashboard/sign-in/callback',
          summary: 'Where the provider leads back to',
        },
        answers: { 302: null },
      },
    ],
  },
  {
    tag: 'For backends',
    about: 'What a backend asks the edge.',
    caller: 'backend',
    endpoints: [
      {
        ...{ method: 'GET', path: '/internal/v1/masks/{id}', summary: 'The bits of a mask id' },
        answers: { 200: 'MaskRecord' },
      },
    ],
  },
];

/** Of a query whose values are turned into something else once they are read. */
function fieldsOf(schema: z.ZodType): z.ZodObject {
  let inner: z.ZodType = schema;
  while (inner instanceof z.ZodPipe) inner = inner.in as z.ZodType;
  return inner as z.ZodObject;
}
