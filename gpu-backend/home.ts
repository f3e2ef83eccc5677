/** Where everything that outlives a process is kept: models, masks, the local database, development keys. */
import { homedir } from 'node:os';
import path from 'node:path';

/** An absolute folder: `MASKROUTE_HOME`, or `~/.cache/maskroute`. It need not exist yet. */
export function maskrouteHome(env: NodeJS.ProcessEnv = process.env): string {
  const named = env.MASKROUTE_HOME;
  return named === undefined || named === ''
    ? path.join(homedir(), '.cache', 'maskroute')
    : path.resolve(named);
}
