/** Task files: JSONL; PIQA's labels may lie beside them, one a line. */
import { stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { ZodError } from 'zod';
import { MaskrouteError } from '../../../shared/errors.ts';
import { readLines } from '../../calibration/read-lines.ts';
import { toQuestion } from './formats.ts';
import type { Question, Task } from './question.ts';
import { TASKS } from './question.ts';

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

/** @param limit the first so many, as the harness takes them. @throws MaskrouteError `invalid_data`. */
export async function readTask({ task, path }: TaskFile, limit: number): Promise<Question[]> {
  const labels = task === 'piqa' ? await readLabels(path) : undefined;
  const questions: Question[] = [];
  for await (const line of readLines(path, LINE_CHARS_MAX)) {
    if (questions.length >= limit) break;
    if (line.text.trim() === '') continue;
    const fail = (reason: string, cause: unknown) =>
      new MaskrouteError('invalid_data', `${basename(path)}:${line.number}: ${reason}`, { cause });
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

/** `valid.jsonl` → `valid-labels.lst`; undefined where there is none, and the rows must say it. */
async function readLabels(path: string): Promise<string[] | undefined> {
  const beside = join(dirname(path), `${basename(path).replace(/\.[^.]*$/, '')}-labels.lst`);
  if (!(await stat(beside).catch(() => undefined))) return undefined;
  const labels: string[] = [];
  for await (const { text } of readLines(beside, 100)) if (text.trim() !== '') labels.push(text.trim());
  return labels;
}
