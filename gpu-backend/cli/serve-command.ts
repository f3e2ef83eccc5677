/** `serve`: the backend alone, until SIGTERM or SIGINT. */
import type { Command } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { PREFIX_TOKENS_MAX } from '../engine/prefix-cache.ts';
import { maskrouteHome } from '../files.ts';
import type { KvType } from '../model/model-source.ts';
import type { DeviceChoice } from '../onnx/device.ts';
import { deviceOption, examples, kvTypeOption, portFrom } from './terminal.ts';

const BACKEND_PORT = 8080;

const ENVIRONMENT = `
Environment:
  MASKROUTE_BACKEND_KEY  the key that callers hold, or that the edge signs its tokens with (required)
  MASKROUTE_BACKEND_KEY_2  a second key, taken too while the first is rotated
  BACKEND_PORT           ${BACKEND_PORT} unless given; 0 for any free one
  BACKEND_HOST           127.0.0.1 unless given; 0.0.0.0 for every network
  MASKROUTE_BACKEND_URL  the address by which the edge calls this backend; tokens for others are refused then
  MASKROUTE_EDGE_URL     where unknown masks are fetched; without it, where the edge's EDGE_URL says
  MASKROUTE_METRICS_KEY  the key that reads /metrics and nothing else; without it only the backend key does
  MASKROUTE_JOB_DATA     a folder whose files jobs may name as their data; without it data is uploaded
  MASKROUTE_QUEUE      redis://host:port, where jobs hand their work to maskroute work; without it they do it here
  MASKROUTE_JOURNAL    the folder that those workers write to
  MASKROUTE_CACHE_TOKENS  room for keys and values of requests that run, in tokens; 8 times the model's context unless given
  MASKROUTE_KV_TYPE    how keys and values are kept: f32, or f16 in half the memory
  MASKROUTE_PREFIX_TOKENS  room for prompts that later ones begin with, in tokens; ${PREFIX_TOKENS_MAX} unless given, 0: none
  OTEL_EXPORTER_OTLP_ENDPOINT  a collector of traces (http/protobuf); without it none are made
  OTEL_EXPORTER_OTLP_HEADERS   what it wants in headers: name=value,name=value, percent-encoded
  OTEL_RESOURCE_ATTRIBUTES     how this backend is named in its spans, and OTEL_SERVICE_NAME
  MASKROUTE_HOME         models and masks (~/.cache/maskroute)`;

function tokensFrom(name: string, text: string): number {
  if (/^\d{1,9}$/.test(text)) return Number(text);
  const message = `${name} must be a whole number of tokens, not "${text}".`;
  throw new MaskrouteError('invalid_argument', message);
}

/** @throws MaskrouteError `invalid_argument`. */
function addressFrom(name: string, text: string): string {
  if (/^https?:$/.test(URL.parse(text)?.protocol ?? '')) return text;
  throw new MaskrouteError('invalid_argument', `${name} must be an http or https address, not "${text}".`);
}

/** `jobEntry`: the file that runs commands, for jobs. */
export function addServeCommand(program: Command, jobEntry: string): void {
  program
    .command('serve')
    .description('run the backend alone')
    .requiredOption('--model <name>', 'an installed model')
    .addOption(deviceOption())
    .addOption(kvTypeOption())
    .addHelpText('after', ENVIRONMENT)
    .addHelpText(
      'after',
      examples('MASKROUTE_BACKEND_KEY=$(openssl rand -hex 24) maskroute serve --model smollm2-135m-instruct'),
    )
    .action(async (flags: { model: string; device: DeviceChoice; kvType: KvType }) => {
      const { serveUntilSignal } = await import('../main.ts');
      const { collectorFrom } = await import('../../shared/tracing/collector.ts');
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
        port: portFrom('BACKEND_PORT', BACKEND_PORT),
        backendKey: MASKROUTE_BACKEND_KEY ?? '',
        ...(MASKROUTE_BACKEND_KEY_2 ? { otherBackendKey: MASKROUTE_BACKEND_KEY_2 } : {}),
        ...(BACKEND_HOST ? { host: BACKEND_HOST } : {}),
        jobEntry,
        collector: collectorFrom(process.env),
        ...(MASKROUTE_CACHE_TOKENS
          ? { cacheTokens: tokensFrom('MASKROUTE_CACHE_TOKENS', MASKROUTE_CACHE_TOKENS) }
          : {}),
        ...(MASKROUTE_PREFIX_TOKENS
          ? { prefixTokens: tokensFrom('MASKROUTE_PREFIX_TOKENS', MASKROUTE_PREFIX_TOKENS) }
          : {}),
        ...(MASKROUTE_JOB_DATA ? { jobDataFolder: MASKROUTE_JOB_DATA } : {}),
        ...(MASKROUTE_BACKEND_URL
          ? { audience: addressFrom('MASKROUTE_BACKEND_URL', MASKROUTE_BACKEND_URL) }
          : {}),
        ...(MASKROUTE_METRICS_KEY ? { metricsKey: MASKROUTE_METRICS_KEY } : {}),
        ...(MASKROUTE_EDGE_URL ? { edgeUrl: addressFrom('MASKROUTE_EDGE_URL', MASKROUTE_EDGE_URL) } : {}),
      });
    });
}
