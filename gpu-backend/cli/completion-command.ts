/** `completion`: prints a shell's completion script. The script lists all commands, so that TAB starts no process. */
import { Argument, type Command } from 'commander';
import { examples } from './help.ts';

const SHELLS = ['bash', 'zsh', 'fish'] as const;
type Shell = (typeof SHELLS)[number];

export function addCompletionCommand(program: Command): void {
  program
    .command('completion')
    .description('print the completion script of a shell')
    .addArgument(new Argument('<shell>', 'the shell').choices(SHELLS))
    .addHelpText(
      'after',
      examples(
        'source <(maskroute completion bash)                  # in ~/.bashrc',
        'source <(maskroute completion zsh)                   # in ~/.zshrc, after compinit',
        'maskroute completion fish > ~/.config/fish/completions/maskroute.fish',
      ),
    )
    .action((shell: Shell) => console.log(SCRIPTS[shell](pathsOf(program, ''))));
}

/** A command's path, such as ` model pull`, and the words that may follow it. */
type Place = { readonly path: string; readonly words: readonly { word: string; about: string }[] };

function pathsOf(command: Command, path: string): Place[] {
  const below = command.createHelp().visibleCommands(command);
  const words = [
    ...below.map((sub) => ({ word: sub.name(), about: sub.description() })),
    ...command
      .createHelp()
      .visibleOptions(command)
      .map((option) => ({ word: option.long ?? option.short!, about: option.description })),
    ...command.registeredArguments.flatMap(({ argChoices = [] }) =>
      argChoices.map((word) => ({ word, about: '' })),
    ),
  ];
  return [
    { path, words },
    ...below.filter((sub) => sub.name() !== 'help').flatMap((sub) => pathsOf(sub, `${path} ${sub.name()}`)),
  ];
}

/** `-o default` completes file names where no word fits. */
const bash = (places: readonly Place[]): string => `_maskroute() {
  local current="\${COMP_WORDS[COMP_CWORD]}" place="" words="" word
  for word in "\${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$place $word" in
      ${places
        .slice(1)
        .map(({ path }) => `"${path}"`)
        .join('|')}) place="$place $word" ;;
    esac
  done
  case "$place" in
${places.map(({ path, words }) => `    "${path}") words="${words.map(({ word }) => word).join(' ')}" ;;`).join('\n')}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _maskroute maskroute`;

const zsh = (places: readonly Place[]): string => `autoload -U +X bashcompinit && bashcompinit
${bash(places)}`;

const quoted = (text: string): string => `'${text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;

const fish = (places: readonly Place[]): string =>
  places
    .flatMap(({ path, words }) => {
      const seen = path.trim().split(' ').filter(Boolean);
      const next = words.filter(({ word }) => !word.startsWith('-')).map(({ word }) => word);
      const conditions = [
        ...seen.map((word) => `__fish_seen_subcommand_from ${word}`),
        ...(next.length === 0 ? [] : [`not __fish_seen_subcommand_from ${next.join(' ')}`]),
      ];
      const where = conditions.length === 0 ? '' : ` -n ${quoted(conditions.join('; and '))}`;
      return words.map(({ word, about }) =>
        word.startsWith('--')
          ? `complete -c maskroute${where} -l ${word.slice(2)} -d ${quoted(about)}`
          : `complete -c maskroute${where} -a ${quoted(word)} -d ${quoted(about)}`,
      );
    })
    .join('\n');

const SCRIPTS: Readonly<Record<Shell, (places: readonly Place[]) => string>> = { bash, zsh, fish };
