/**
 * `maskroute`: every command of the project. A command's parts load when it runs, so that `--help` is quick.
 * An expected error prints one line; the exit code is 1, or 2 for wrong usage. An unexpected error prints its stack.
 */
import { type Command, CommanderError } from 'commander';
import manifest from '../../package.json' with { type: 'json' };
import { addBenchCommands } from './bench-command.ts';
import { addCompletionCommand } from './completion-command.ts';
import { addDistillCommand } from './distill-command.ts';
import { addEvaluationCommand } from './evaluate-command.ts';
import { examples, newCommand, sayError, USAGE_EXIT } from './help.ts';
import { addLearnCommand } from './learn-command.ts';
import { addModelCommands } from './model-command.ts';
import { addPublishCommands, addRegisterCommand } from './publish-command.ts';
import { addScheduleCommands } from './schedule-command.ts';
import { addServeCommand } from './serve-command.ts';
import { addStatusCommands } from './status-command.ts';
import { addSurrogatesCommand } from './surrogates-command.ts';
import { becomeJob } from './terminal.ts';
import { addWorkCommand } from './work-command.ts';

export const program = newCommand(
  'maskroute',
  'One language model, many block masks, and an edge that picks the right mask for every request.',
)
  .version(manifest.version, '--version', 'print the version')
  .exitOverride()
  .addHelpText(
    'after',
    examples('maskroute model list', 'maskroute status', 'maskroute learn --help     # what a command takes'),
  );

addModelCommands(program);
addLearnCommand(program);
addDistillCommand(program);
addWorkCommand(program);
addSurrogatesCommand(program);
addEvaluationCommand(program);
addPublishCommands(program);
addStatusCommands(program);
addScheduleCommands(program);
addRegisterCommand(program);
// The backend runs its jobs as commands of this file.
addServeCommand(program, import.meta.filename);
addBenchCommands(program);
addCompletionCommand(program);

process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  // EPIPE: the reader has gone, as in `maskroute … | head`.
  if (error.code !== 'EPIPE') sayError(error);
  process.exit();
});
process.stderr.on('error', ({ code }: NodeJS.ErrnoException) => {
  // Work goes on when its progress cannot be written, for example on a full disk.
  if (code === 'EPIPE') process.exit();
});

/** Runs the command of `args`, and sets `process.exitCode`. */
export async function main(args: readonly string[]): Promise<void> {
  try {
    // A backend sets it for its jobs.
    const jobFolder = process.env.MASKROUTE_JOB_FOLDER;
    if (jobFolder) await becomeJob(jobFolder);
    await program.parseAsync(asUnderstood(program, args), { from: 'user' });
  } catch (error) {
    // Commander has already printed the error, the help or the version.
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? 0 : USAGE_EXIT;
      return;
    }
    sayError(error);
  }
}

/**
 * `help` as Commander understands it. It answers `help xyz` with the help of `parent` and no error, but `xyz` with an error
 * that suggests another name; and `help model pull` with the help of `model`, but `model help pull` with that of `pull`.
 */
function asUnderstood(parent: Command, args: readonly string[]): readonly string[] {
  const [word, ...rest] = args;
  const isHelp = word === 'help' && rest.length > 0;
  const [name, ...more] = isHelp ? rest : args;
  const command = parent.commands.find((command) => command.name() === name);
  if (command === undefined) return isHelp ? rest : args;
  if (command.commands.length === 0) return args;
  return [command.name(), ...asUnderstood(command, isHelp ? ['help', ...more] : more)];
}

// Jobs start this file directly; `bin/maskroute.js` calls `main`.
if (process.argv[1] === import.meta.filename) await main(process.argv.slice(2));
