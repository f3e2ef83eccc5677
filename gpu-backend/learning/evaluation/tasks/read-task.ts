/**
 * Reads rows of the six multiple-choice sets, in the forms that their authors and the Hugging Face hub distribute, and
 * turns them into the questions that lm-evaluation-harness asks (its task files of version 1.0).
 */
import { stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { ZodError, z } from 'zod';
import { MaskrouteError } from '../../../../shared/wire/errors.ts';
import { readLines } from '../../data/read-data.ts';

const TASKS = ['openbookqa', 'winogrande', 'hellaswag', 'piqa', 'arc_easy', 'arc_challenge'] as const;
export type Task = (typeof TASKS)[number];

/** A multiple-choice question as it is scored: one pair of context and continuation for each choice. */
export type Question = {
  readonly choices: readonly { readonly context: string; readonly continuation: string }[];
  /** Characters (code points) that the harness divides each choice's log-likelihood by. */
  readonly lengths: readonly number[];
  /** Index of the right choice. */
  readonly gold: number;
  /** The text that the edge would route the request by. */
  readonly routeText: string;
};

/** The harness gives no length-normalised accuracy for WinoGrande: its choices are contexts, not continuations. */
export const hasNorm = (task: Task): boolean => task !== 'winogrande';

const LINE_CHARS_MAX = 1_000_000;

export type TaskFile = { readonly task: Task; readonly path: string };

/** `TASK=FILE`, or a file whose path names its task. @throws MaskrouteError `invalid_argument`. */
export function parseTaskFile(argument: string): TaskFile {
  const [, name, named] = /^([a-z_-]+)=(.+)$/.exec(argument) ?? [];
  const path = named ?? argument;
  const place = (name ?? path).toLowerCase().replaceAll('-', '_');
  const task =
    name === undefined
      ? TASKS.find((known) => place.split(/[\\/.]/).some((part) => part.startsWith(known)))
      : TASKS.find((known) => known === place);
  if (task !== undefined) return { task, path };
  throw new MaskrouteError(
    'invalid_argument',
    `${argument}: write TASK=FILE, where TASK is one of ${TASKS.join(', ')}.`,
  );
}

/**
 * Reads a JSONL file; PIQA's labels may be in a second file beside it.
 * @param limit takes the first so many questions, as the harness does. @throws MaskrouteError `invalid_data`.
 */
export async function readTask({ task, path }: TaskFile, limit: number): Promise<Question[]> {
  const labels = task === 'piqa' ? await readLabels(path) : undefined;
  const questions: Question[] = [];
  for await (const line of readLines(path, LINE_CHARS_MAX)) {
    if (questions.length >= limit) break;
    if (line.text.trim() === '') continue;
    const fail = (reason: string, cause: unknown) =>
      new MaskrouteError('invalid_data', `${path}:${line.number}: ${reason}`, { cause });
    try {
      const row: unknown = JSON.parse(line.text);
      const label = labels?.[questions.length];
      questions.push(toQuestion(task, label === undefined ? row : { ...(row as object), label }));
    } catch (error) {
      const form = error instanceof ZodError ? `no row of ${task}` : (error as Error).message;
      throw fail(form, error);
    }
  }
  if (questions.length === 0) throw new MaskrouteError('invalid_data', `${path} has no question.`);
  return questions;
}

/**
 * Labels from `valid-labels.lst` beside `valid.jsonl`; undefined without that file: then the rows have their labels.
 */
async function readLabels(path: string): Promise<string[] | undefined> {
  const beside = join(dirname(path), `${basename(path).replace(/\.[^.]*$/, '')}-labels.lst`);
  if (!(await stat(beside).catch(() => undefined))) return undefined;
  const labels: string[] = [];
  for await (const { text } of readLines(beside, 100)) if (text.trim() !== '') labels.push(text.trim());
  return labels;
}

const text = z.string();
/** The authors' form, and the hub's columns. */
const labelled = z.union([
  z
    .array(z.looseObject({ text, label: text }))
    .min(2)
    .transform((choices) => ({
      texts: choices.map((choice) => choice.text),
      labels: choices.map(({ label }) => label),
    })),
  z
    .looseObject({ text: z.array(text).min(2), label: z.array(text).min(2) })
    .transform((columns) => ({ texts: columns.text, labels: columns.label })),
]);

const arc = z.union([
  z
    .looseObject({ question: z.looseObject({ stem: text, choices: labelled }), answerKey: text })
    .transform(({ question: { stem, choices }, answerKey }) => ({ stem, choices, answerKey })),
  z
    .looseObject({ question: text, choices: labelled, answerKey: text })
    .transform(({ question: stem, choices, answerKey }) => ({ stem, choices, answerKey })),
  z
    .looseObject({ question_stem: text, choices: labelled, answerKey: text })
    .transform(({ question_stem: stem, choices, answerKey }) => ({ stem, choices, answerKey })),
]);

const numbered = z.looseObject({
  question_stem: text,
  choices: z.array(text).min(2),
  answer: z.int().min(0),
});
const winogrande = z.looseObject({
  sentence: text.regex(/_/),
  option1: text,
  option2: text,
  answer: z.enum(['1', '2']),
});
/** A number, or a string of digits. Splits without answers have "", which must not be read as 0. */
const index = z.union([z.int().min(0), text.regex(/^\d+$/).transform(Number)]);
const piqa = z.looseObject({
  goal: text,
  sol1: text,
  sol2: text,
  label: index,
});
const hellaswag = z.looseObject({
  activity_label: text,
  ctx_a: text,
  ctx_b: text,
  endings: z.array(text).min(2),
  label: index,
});

/** @throws ZodError on another form, RangeError when the right choice is not among them. */
export function toQuestion(task: Task, row: unknown): Question {
  switch (task) {
    case 'arc_easy':
    case 'arc_challenge': {
      const { stem, choices, answerKey } = arc.parse(row);
      return checked(
        question(`Question: ${stem}\nAnswer:`, choices.texts, choices.labels.indexOf(answerKey)),
      );
    }
    case 'openbookqa': {
      const plain = numbered.safeParse(row);
      if (plain.success)
        return checked(question(plain.data.question_stem, plain.data.choices, plain.data.answer));
      const { stem, choices, answerKey } = arc.parse(row);
      return checked(question(stem, choices.texts, choices.labels.indexOf(answerKey.trimStart())));
    }
    case 'piqa': {
      const { goal, sol1, sol2, label } = piqa.parse(row);
      return checked(question(`Question: ${goal}\nAnswer:`, [sol1, sol2], label));
    }
    case 'hellaswag': {
      const { activity_label, ctx_a, ctx_b, endings, label } = hellaswag.parse(row);
      const context = cleaned(`${activity_label}: ${ctx_a} ${capitalised(ctx_b)}`);
      return checked(question(context, endings.map(cleaned), label));
    }
    case 'winogrande': {
      const { sentence, option1, option2, answer } = winogrande.parse(row);
      const gap = sentence.indexOf('_');
      const contexts = [option1, option2].map((option) => sentence.slice(0, gap) + option);
      const continuation = ` ${sentence.slice(gap + 1).trim()}`;
      return {
        choices: contexts.map((context) => ({ context, continuation })),
        lengths: contexts.map(characters),
        gold: Number(answer) - 1,
        routeText: sentence.trim(),
      };
    }
  }
}

/** One context and a continuation for each choice, joined by a space. @throws RangeError when the context is blank. */
function question(context: string, choices: readonly string[], gold: number): Question {
  if (context.trim() === '') throw new RangeError('there is no question');
  return {
    choices: choices.map((choice) => ({ context, continuation: ` ${choice}` })),
    lengths: choices.map(characters),
    gold,
    routeText: context.trim(),
  };
}

function checked(found: Question): Question {
  if (found.gold >= 0 && found.gold < found.choices.length) return found;
  throw new RangeError('the right answer is none of the choices');
}

const characters = (text: string): number => [...text].length;

/** Python's `str.capitalize`. */
const capitalised = (value: string): string => value.slice(0, 1).toUpperCase() + value.slice(1).toLowerCase();

/** Removes WikiHow's markup as the harness does. */
const cleaned = (value: string): string =>
  value
    .trim()
    .replaceAll(' [title]', '. ')
    .replace(/\[.*?\]/g, '')
    .replaceAll('  ', ' ');
