/**
 * Rows of the six sets, in the forms that their authors and the hub distribute, as the questions that
 * lm-evaluation-harness makes of them (its task files of version 1.0).
 */
import { z } from 'zod';
import type { Question, Task } from './question.ts';
import { characters, question } from './question.ts';

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
const piqa = z.looseObject({
  goal: text,
  sol1: text,
  sol2: text,
  label: z.coerce.number().int().min(0).max(1),
});
const hellaswag = z.looseObject({
  activity_label: text,
  ctx_a: text,
  ctx_b: text,
  endings: z.array(text).min(2),
  label: z.coerce.number().int().min(0),
});

/** @throws ZodError on another form, RangeError when the right choice is none of them. */
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
      return question(`Question: ${goal}\nAnswer:`, [sol1, sol2], label);
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

function checked(found: Question): Question {
  if (found.gold >= 0 && found.gold < found.choices.length) return found;
  throw new RangeError('the right answer is none of the choices');
}

/** Python's `str.capitalize`. */
const capitalised = (value: string): string => value.slice(0, 1).toUpperCase() + value.slice(1).toLowerCase();

/** WikiHow's leftovers, as the harness removes them. */
const cleaned = (value: string): string =>
  value
    .trim()
    .replaceAll(' [title]', '. ')
    .replace(/\[.*?\]/g, '')
    .replaceAll('  ', ' ');
