/** The answers of the edge by name, as OpenAPI lists them among its components. */
import { z } from 'zod';
import * as wire from '../admin/admin-wire.ts';
import * as experiments from '../admin/experiment-wire.ts';
import * as jobs from '../admin/job-wire.ts';
import * as publications from '../admin/publication-wire.ts';
import * as requests from '../admin/requests-wire.ts';
import * as stats from '../admin/stats-wire.ts';
import { maskSetSchema } from '../mask/mask-set.ts';
import * as backends from '../wire/backend-load.ts';
import { dryRunSchema } from '../wire/openai.ts';
import { maskRecordSchema, maskrouteInfoSchema, modelListSchema } from '../wire/protocol.ts';

const usage = z.looseObject({
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
  total_tokens: z.int(),
  prompt_tokens_details: z.looseObject({ cached_tokens: z.int() }),
  completion_tokens_details: z
    .looseObject({ accepted_prediction_tokens: z.int(), rejected_prediction_tokens: z.int() })
    .optional(),
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
    maskroute: maskrouteInfoSchema,
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
  AuditEntry: wire.auditEntrySchema,
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
