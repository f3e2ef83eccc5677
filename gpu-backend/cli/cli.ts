/**
 * `maskroute`: every command of the project. A command's parts load when it runs, so that `--help` is quick.
 * An error that a person can meet is one clear line and exit code 1; anything else shows its stack.
 */
import { Command } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { addBenchCommands } from './bench-command.ts';
import { addEvaluationCommand } from './evaluate-command.ts';
import { addLearnCommands } from './learn-command.ts';
import { addModelCommands } from './model-command.ts';
import { addPublishCommands, addRegisterCommand } from './publish-command.ts';
import { addServeCommand } from './serve-command.ts';
import { addSurrogatesCommand } from './surrogates-command.ts';
import { becomeJob } from './terminal.ts';

const program = new Command('maskroute')
  .description(
    'One language model, many block masks, and an edge that picks the right mask for every request.',
  )
  .showHelpAfterError('(run with --help for the options)');

addModelCommands(program);
addLearnCommands(program);
addSurrogatesCommand(program);
addEvaluationCommand(program);
addPublishCommands(program);
addRegisterCommand(program);
// The backend's jobs are commands of this same file.
addServeCommand(program, import.meta.filename);
addBenchCommands(program);

/** Runs what `args` say, and leaves the exit code in `process.exitCode`. */
export async function main(args: readonly string[]): Promise<void> {
  // A backend sets it for its jobs.
  const jobFolder = process.env.MASKROUTE_JOB_FOLDER;
  if (jobFolder) becomeJob(jobFolder);
  try {
    await program.parseAsync(args, { from: 'user' });
  } catch (error) {
    console.error(isForPeople(error) ? `error: ${error.message}` : error);
    process.exitCode = 1;
  }
}

/** Our own errors, and the system's: no such file, no room, no right to. */
function isForPeople(error: unknown): error is Error {
  return error instanceof MaskrouteError || (error instanceof Error && 'syscall' in error);
}

// By its own name, as jobs start it; `bin/maskroute.js` calls it.
if (process.argv[1] === import.meta.filename) await main(process.argv.slice(2));
