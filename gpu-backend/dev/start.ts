/** `npm start`: the whole product on this machine until SIGINT or SIGTERM; then it drains and exits with 0. */
import { once } from 'node:events';
import { collectorFrom } from '../../shared/tracing/traces.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { allowedOriginsSchema } from '../../shared/wire/protocol.ts';
import { newCommand, parseScript, sayError } from '../cli/help.ts';
import { computingThreads, portFrom } from '../cli/terminal.ts';
import { maskrouteHome } from '../files.ts';
import { onStopSignal } from '../stop-signals.ts';
import { outliveOutput } from './children.ts';
import { type DevFile, devFilePath } from './dev-home.ts';
import { createStep, logFolder, startProduct } from './product.ts';

const { restore } = parseScript<{ restore?: string }>(
  newCommand('npm start --', 'run the whole product on this machine: the default model, a backend, an edge')
    .option('--restore <file>', 'begin with this copy of the database in place of what is there')
    .addHelpText(
      'after',
      '\nPORT and BACKEND_PORT set the ports, MASKROUTE_THREADS how many threads compute, MASKROUTE_HOME the folder of models, data and keys.',
    ),
  ['npm start', 'PORT=9000 npm start', 'npm start -- --restore ~/.cache/maskroute/backup/COPY'],
);

const EDGE_PORT = 8787;
const BACKEND_PORT = 8080;

async function main(): Promise<void> {
  outliveOutput();
  const signal = stopSignal();
  const stopped = once(signal, 'abort');
  const home = maskrouteHome();
  const product = await startProduct({
    home,
    port: portFrom('PORT', EDGE_PORT),
    backendPort: portFrom('BACKEND_PORT', BACKEND_PORT),
    threads: computingThreads(),
    allowedOrigins: allowedOrigins(),
    collector: collectorFrom(process.env),
    restore,
    say: console.log,
    step: createStep(),
    signal,
  }).catch((error: unknown) => {
    if (signal.aborted) return undefined;
    throw error;
  });
  if (product === undefined) return;
  console.log(greeting(product.dev, home));
  await stopped;
  await product.stop();
}

const PARENT_POLL_ms = 500;

/** Aborts at SIGINT, SIGTERM, SIGHUP, or when npm, which started this, was killed and can pass no signal on. */
function stopSignal(): AbortSignal {
  const stop = new AbortController();
  const ask = () => {
    if (stop.signal.aborted) return;
    console.log('Stopping: running answers finish first. (Once more ends it at once.)');
    stop.abort();
  };
  onStopSignal(ask, ['SIGINT', 'SIGTERM', 'SIGHUP']);
  if (process.env.npm_lifecycle_event === 'start') {
    const npm = process.ppid;
    setInterval(() => process.ppid !== npm && ask(), PARENT_POLL_ms).unref();
  }
  return stop.signal;
}

/** @throws MaskrouteError `invalid_argument`: the edge would refuse it, too, and every request with it. */
function allowedOrigins(): string | undefined {
  const { ALLOWED_ORIGINS: given } = process.env;
  const issue = allowedOriginsSchema.optional().safeParse(given).error?.issues[0];
  if (issue === undefined) return given;
  throw new MaskrouteError('invalid_argument', `ALLOWED_ORIGINS: ${issue.message}, not ${given}.`);
}

const greeting = ({ edge, backend, apiKey, model }: DevFile, home: string): string => `
Maskroute is ready at ${edge}

  API            ${edge}/v1
  Dashboard      ${edge}/dashboard
  Documentation  ${edge}/docs
  Backend        ${backend}
  Logs           ${logFolder(home)}
  Admin key      adminKey in ${devFilePath(home)}

Try:
curl -N ${edge}/v1/chat/completions -H 'authorization: Bearer ${apiKey}' -H 'content-type: application/json' -d '{"model": "${model}", "stream": true, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'`;

try {
  await main();
  process.exit(0);
} catch (error) {
  sayError(error);
  process.exit();
}
