/** `serve`: the backend alone, until SIGTERM or SIGINT. */
import type { Command } from 'commander';
import { portFrom } from '../dev/ports.ts';
import { maskrouteHome } from '../home.ts';

const BACKEND_PORT = 8080;

const ENVIRONMENT = `
Environment:
  MASKROUTE_BACKEND_KEY  the key that callers hold, or that the edge signs its tokens with (required)
  BACKEND_PORT           ${BACKEND_PORT} unless given; 0 for any free one
  BACKEND_HOST           127.0.0.1 unless given; 0.0.0.0 for every network
  MASKROUTE_BACKEND_URL  the address by which the edge calls this backend; tokens for others are refused then
  MASKROUTE_EDGE_URL     where unknown masks are fetched, unless the caller's token says
  MASKROUTE_JOB_DATA     a folder whose files jobs may name as their data; without it data is uploaded
  MASKROUTE_HOME         models and masks (~/.cache/maskroute)`;

/** `jobEntry`: the file that runs commands, for jobs. */
export function addServeCommand(program: Command, jobEntry: string): void {
  program
    .command('serve')
    .description('run the backend alone')
    .requiredOption('--model <name>', 'an installed model')
    .addHelpText('after', ENVIRONMENT)
    .action(async ({ model }: { model: string }) => {
      const { serveUntilSignal } = await import('../main.ts');
      const {
        MASKROUTE_BACKEND_KEY,
        MASKROUTE_BACKEND_URL,
        MASKROUTE_EDGE_URL,
        MASKROUTE_JOB_DATA,
        BACKEND_HOST,
      } = process.env;
      await serveUntilSignal({
        home: maskrouteHome(),
        model,
        port: portFrom(process.env, 'BACKEND_PORT', BACKEND_PORT),
        backendKey: MASKROUTE_BACKEND_KEY ?? '',
        ...(BACKEND_HOST ? { host: BACKEND_HOST } : {}),
        jobEntry,
        ...(MASKROUTE_JOB_DATA ? { jobDataFolder: MASKROUTE_JOB_DATA } : {}),
        ...(MASKROUTE_BACKEND_URL ? { audience: MASKROUTE_BACKEND_URL } : {}),
        ...(MASKROUTE_EDGE_URL ? { edgeUrl: MASKROUTE_EDGE_URL } : {}),
      });
    });
}
