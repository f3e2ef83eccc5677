#!/usr/bin/env node
/**
 * The entry of the command line. Node 24 runs the TypeScript sources as they are; an older Node starts the Node 24 that
 * the project has as a dependency. This file is plain JavaScript, so that any Node can read it.
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import module from 'node:module';
import { fileURLToPath } from 'node:url';
import { withLargePages } from '../gpu-backend/large-pages.js';

const NODE_MAJOR_MIN = 24;
const cli = new URL('../gpu-backend/cli/cli.ts', import.meta.url);
const env = withLargePages(process.env);
/** Holds the id of a process that started itself once more. */
const STARTED_AGAIN = 'MASKROUTE_STARTED_AGAIN';

if (Number(process.versions.node.split('.')[0]) >= NODE_MAJOR_MIN) {
  // The variable works from the start of a process only. A parent's channel would be lost. And a Node with privileges of its own
  // never sees the variable: the C library removes it.
  const isStartedAgain = process.env[STARTED_AGAIN] === String(process.pid);
  delete process.env[STARTED_AGAIN];
  if (env !== process.env && process.channel === undefined && !isStartedAgain)
    process.execve(process.execPath, [process.execPath, ...process.execArgv, ...process.argv.slice(1)], {
      ...env,
      [STARTED_AGAIN]: String(process.pid),
    });
  module.enableCompileCache((await import('../gpu-backend/compiled-folder.js')).COMPILED_FOLDER);
  await (await import(cli.href)).main(process.argv.slice(2));
} else {
  handOver(fileURLToPath(new URL('../node_modules/.bin/node', import.meta.url)));
}

function handOver(node) {
  if (!existsSync(node)) {
    console.error(
      `maskroute needs Node ${NODE_MAJOR_MIN} or newer, or "npm ci" in its folder; this is ${process.version}.`,
    );
    process.exit(1);
  }
  const child = spawn(node, [fileURLToPath(cli), ...process.argv.slice(2)], { stdio: 'inherit', env });
  // A terminal sends Ctrl-C to both processes, so the child gets it twice; `stop-signals.ts` counts the two as one.
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
  child.on('exit', (code, signal) => {
    if (signal === null) process.exit(code);
    process.removeAllListeners(signal);
    process.kill(process.pid, signal);
  });
}
