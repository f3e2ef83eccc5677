/**
 * What the commands of `maskroute` and npm's scripts have in common: help that ends with examples and names each default
 * once, one line about what is wrong, and exit code 2 for a command that was not called right.
 */
import { Command, type Option } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';

export const USAGE_EXIT = 2;

export const examples = (...lines: string[]): string =>
  `\n${lines.length === 1 ? 'Example' : 'Examples'}:\n${lines.map((line) => `  ${line}`).join('\n')}`;

/** Commands that are made below it are alike. */
export const newCommand = (name: string, description: string): Command =>
  new Command(name)
    .description(description)
    .helpOption('-h, --help', 'print this help')
    .helpCommand('help [command]', 'print the help of a command')
    .showHelpAfterError('(run with --help for the options)')
    .configureHelp({ optionDescription });

/** What it is, whether it must be given, what may be, and what holds when nothing is. */
function optionDescription({ description, mandatory, argChoices, envVar, ...option }: Option): string {
  const preset = option.defaultValueDescription ?? inWords(option.defaultValue);
  const more = [
    ...(mandatory ? ['required'] : []),
    ...(argChoices === undefined ? [] : [`choices: ${argChoices.join(', ')}`]),
    ...(preset === '' ? [] : [`default: ${preset}`]),
    ...(envVar === undefined ? [] : [`environment: ${envVar}`]),
  ];
  return more.length === 0 ? description : `${description} (${more.join('; ')})`;
}

/** Of a switch that is off, and of a list that is empty, nothing is said. */
const inWords = (preset: unknown): string =>
  preset === undefined || typeof preset === 'boolean' ? '' : String(preset);

/**
 * What an npm script was called with. The process ends after help, and with exit code 2 when it was not called right.
 * `lines`: the examples that its help ends with.
 */
export function parseScript<Options extends object>(
  command: Command,
  lines: readonly string[],
  args: readonly string[] = process.argv.slice(2),
): Options {
  return command
    .helpCommand(false)
    .addHelpText('after', examples(...lines))
    .exitOverride(({ exitCode }) => process.exit(exitCode === 0 ? 0 : USAGE_EXIT))
    .parse(args, { from: 'user' })
    .opts<Options>();
}

/** One line for what a person can meet; a stack for a bug. Leaves the exit code. */
export function sayError(error: unknown): void {
  console.error(isForPeople(error) ? `error: ${error.message}` : error);
  process.exitCode = isUsage(error) ? USAGE_EXIT : 1;
}

const isUsage = (error: unknown): boolean =>
  error instanceof MaskrouteError && error.code === 'invalid_argument';

/** Our own errors, and the system's: no such file, no room, no right to. */
const isForPeople = (error: unknown): error is Error =>
  error instanceof MaskrouteError || (error instanceof Error && 'syscall' in error);
