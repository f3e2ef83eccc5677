#!/usr/bin/env node
/**
 * The command line's door. The sources are TypeScript that Node 24 runs as they are; an older Node hands
 * over to the one that the project brings as a dependency. (Plain JavaScript, since any Node must read it.)
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import module from 'node:module';
import { fileURLToPath } from 'node:url';

const NODE_MAJOR_MIN = 24;
const cli = new URL('../gpu-backend/cli/cli.ts', import.meta.url);

if (Number(process.versions.node.split('.')[0]) >= NODE_MAJOR_MIN) {
  module.enableCompileCache((await import('../gpu-backend/files.ts')).COMPILED_FOLDER);
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
  const child = spawn(node, [fileURLToPath(cli), ...process.argv.slice(2)], { stdio: 'inherit' });
  // From a terminal a Ctrl-C reaches both, so it comes twice; `stop-signals.ts` takes the two for one.
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
  child.on('exit', (code, signal) => {
    if (signal === null) process.exit(code);
    process.removeAllListeners(signal);
    process.kill(process.pid, signal);
  });
}
