/** A multiple-choice question as it is scored: pairs of context and continuation, one a choice. */
export type Question = {
  readonly choices: readonly { readonly context: string; readonly continuation: string }[];
  /** Characters (code points) that the harness divides each choice's log-likelihood by. */
  readonly lengths: readonly number[];
  /** Index of the right choice. */
  readonly gold: number;
  /** What the edge would route the request by. */
  readonly routeText: string;
};

export const TASKS = ['openbookqa', 'winogrande', 'hellaswag', 'piqa', 'arc_easy', 'arc_challenge'] as const;
export type Task = (typeof TASKS)[number];

/** The harness gives no length-normalised accuracy for WinoGrande: its choices are contexts, not continuations. */
export const hasNorm = (task: Task): boolean => task !== 'winogrande';

export const characters = (text: string): number => [...text].length;

/** One context, a continuation a choice, joined by a blank. @throws RangeError without a context to continue. */
export function question(context: string, choices: readonly string[], gold: number): Question {
  if (context.trim() === '') throw new RangeError('there is no question');
  return {
    choices: choices.map((choice) => ({ context, continuation: ` ${choice}` })),
    lengths: choices.map(characters),
    gold,
    routeText: context.trim(),
  };
}
