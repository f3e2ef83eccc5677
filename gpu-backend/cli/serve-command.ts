/** `serve`: the backend alone, until SIGTERM or SIGINT. */
import { type Command, Option } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { PREFIX_TOKENS_MAX } from '../engine/prefix-cache.ts';
import { maskrouteHome } from '../files.ts';
import type { KvType } from '../model/model-source.ts';
import { examples } from './help.ts';
import {
  computingThreads,
  type DeviceFlags,
  deviceOption,
  floatTypeOption,
  httpAddress,
  kvTypeOption,
  portFrom,
} from './terminal.ts';

const BACKEND_PORT = 8080;

const ENVIRONMENT_HELP: Readonly<Record<string, string>> = {
  MASKROUTE_BACKEND_KEY: 'the key that callers hold, or that the edge signs its tokens with (required)',
  MASKROUTE_BACKEND_KEY_2: 'a second key, accepted too while the first is rotated',
  BACKEND_PORT: `the port (default: ${BACKEND_PORT}; 0: any free one)`,
  BACKEND_HOST: 'the interface (default: 127.0.0.1; 0.0.0.0: every network)',
  MASKROUTE_BACKEND_URL:
    'the address by which the edge calls this backend; tokens for others are refused then',
  MASKROUTE_EDGE_URL: "where unknown masks are fetched (default: where the edge's EDGE_URL says)",
  MASKROUTE_METRICS_KEY: 'a key that reads /metrics and nothing else (default: the backend key only)',
  MASKROUTE_JOB_DATA: 'a folder whose files jobs may name as their data (default: none; data is uploaded)',
  MASKROUTE_QUEUE: 'redis://host:port, where jobs hand their work to maskroute work (default: compute here)',
  MASKROUTE_JOURNAL: 'the folder that those workers write to',
  MASKROUTE_CACHE_TOKENS:
    "room for the KV cache of running requests, in tokens (default: 8 times the model's context)",
  MASKROUTE_PROMPT_LOOKUP: 'on: answers are predicted from what stands in their prompt (default: off)',
  MASKROUTE_KV_TYPE: 'the type of the KV cache: f32, or f16 in half the memory (default: f32)',
  MASKROUTE_THREADS:
    'threads that compute (default: all cores; 1 is as quick where other programs keep them busy)',
  MASKROUTE_PREFIX_TOKENS: `room for cached prompt prefixes, in tokens (default: ${PREFIX_TOKENS_MAX}; 0: none)`,
  OTEL_EXPORTER_OTLP_ENDPOINT: 'a collector of traces, http/protobuf (default: no traces)',
  OTEL_EXPORTER_OTLP_HEADERS: 'headers for the collector: name=value,name=value, percent-encoded',
  OTEL_TRACES_SAMPLER_ARG: 'the share of requests that is traced, from 0 to 1 (default: 1)',
  OTEL_SERVICE_NAME: "this backend's name in its spans (default: maskroute-backend)",
  OTEL_RESOURCE_ATTRIBUTES: 'more about this backend in its spans: name=value,name=value',
  MASKROUTE_HOME: 'models and masks (default: ~/.cache/maskroute)',
};
const NAME_CHARS = Math.max(...Object.keys(ENVIRONMENT_HELP).map(({ length }) => length));
const ENVIRONMENT = `
Environment:
${Object.entries(ENVIRONMENT_HELP)
  .map(([name, about]) => `  ${name.padEnd(NAME_CHARS)}  ${about}`)
  .join('\n')}`;

function tokensFrom(name: string, text: string, min: 0 | 1): number {
  if (/^\d{1,9}$/.test(text) && Number(text) >= min) return Number(text);
  const message = `${name} must be a whole number of tokens${min === 1 ? ' above 0' : ''}, not "${text}".`;
  throw new MaskrouteError('invalid_argument', message);
}

type ServeFlags = DeviceFlags & { model: string; kvType?: KvType; promptLookup?: 'on' | 'off' };

/** `jobEntry`: the file that runs commands, for jobs. */
export function addServeCommand(program: Command, jobEntry: string): void {
  program
    .command('serve')
    .description('run a backend without an edge, until SIGTERM or Ctrl-C')
    .requiredOption('--model <name>', 'an installed model')
    .addOption(deviceOption())
    .addOption(floatTypeOption())
    .addOption(kvTypeOption())
    .addOption(
      new Option('--prompt-lookup <switch>', 'predict answers from what stands in their prompt')
        .choices(['on', 'off'])
        .env('MASKROUTE_PROMPT_LOOKUP'),
    )
    .addHelpText('after', ENVIRONMENT)
    .addHelpText(
      'after',
      examples('MASKROUTE_BACKEND_KEY=$(openssl rand -hex 24) maskroute serve --model smollm2-135m-instruct'),
    )
    .action(async ({ promptLookup, ...flags }: ServeFlags) => {
      const { serveUntilSignal } = await import('../main.ts');
      const { collectorFrom } = await import('../../shared/tracing/traces.ts');
      const {
        MASKROUTE_BACKEND_KEY,
        MASKROUTE_BACKEND_KEY_2,
        MASKROUTE_BACKEND_URL,
        MASKROUTE_EDGE_URL,
        MASKROUTE_JOB_DATA,
        MASKROUTE_METRICS_KEY,
        MASKROUTE_CACHE_TOKENS,
        MASKROUTE_PREFIX_TOKENS,
        BACKEND_HOST,
      } = process.env;
      await serveUntilSignal({
        home: maskrouteHome(),
        ...flags,
        promptLookup: promptLookup === 'on',
        threads: computingThreads(),
        port: portFrom('BACKEND_PORT', BACKEND_PORT),
        backendKey: MASKROUTE_BACKEND_KEY ?? '',
        otherBackendKey: MASKROUTE_BACKEND_KEY_2 || undefined,
        host: BACKEND_HOST || undefined,
        jobEntry,
        collector: collectorFrom(process.env),
        cacheTokens: MASKROUTE_CACHE_TOKENS
          ? tokensFrom('MASKROUTE_CACHE_TOKENS', MASKROUTE_CACHE_TOKENS, 1)
          : undefined,
        prefixTokens: MASKROUTE_PREFIX_TOKENS
          ? tokensFrom('MASKROUTE_PREFIX_TOKENS', MASKROUTE_PREFIX_TOKENS, 0)
          : undefined,
        jobDataFolder: MASKROUTE_JOB_DATA || undefined,
        audience: MASKROUTE_BACKEND_URL
          ? httpAddress('MASKROUTE_BACKEND_URL', MASKROUTE_BACKEND_URL)
          : undefined,
        metricsKey: MASKROUTE_METRICS_KEY || undefined,
        edgeUrl: MASKROUTE_EDGE_URL ? httpAddress('MASKROUTE_EDGE_URL', MASKROUTE_EDGE_URL) : undefined,
      });
    });
}
