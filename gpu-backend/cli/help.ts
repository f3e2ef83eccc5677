/**
 * Shared by the commands of `maskroute` and npm's scripts: help that ends with examples and names each default once,
 * errors in one line, and exit code 2 for wrong usage.
 */
import { Command, type Option } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';

export const USAGE_EXIT = 2;

export const examples = (...lines: string[]): string =>
  `\n${lines.length === 1 ? 'Example' : 'Examples'}:\n${lines.map((line) => `  ${line}`).join('\n')}`;

/** A command with the project's help; its subcommands inherit the settings. */
export const newCommand = (name: string, description: string): Command =>
  new Command(name)
    .description(description)
    .helpOption('-h, --help', 'print this help')
    .helpCommand('help [command]', 'print the help of a command')
    .showHelpAfterError('(run with --help for the options)')
    .configureHelp({ optionDescription });

/** The description of an option, with "required", its choices, its default and its environment variable. */
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

/** A default in words; empty for switches and for empty lists. */
const inWords = (preset: unknown): string =>
  preset === undefined || typeof preset === 'boolean' ? '' : String(preset);

/**
 * Parses the options of an npm script. Exits after help, and with exit code 2 for wrong usage.
 * @param lines the examples at the end of the help.
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

/** Prints an expected error in one line, and a bug with its stack. Sets `process.exitCode`. */
export function sayError(error: unknown): void {
  console.error(isForPeople(error) ? `error: ${error.message}` : error);
  process.exitCode = isUsage(error) ? USAGE_EXIT : 1;
}

const isUsage = (error: unknown): boolean =>
  error instanceof MaskrouteError && error.code === 'invalid_argument';

/** Our own errors, and the system's (no such file, disk full, no permission). */
const isForPeople = (error: unknown): error is Error =>
  error instanceof MaskrouteError || (error instanceof Error && 'syscall' in error);
