/** `report.html` from what a folder holds: a learning run, an evaluation, or both. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { z } from 'zod';
import type { LearnReport } from '../../calibration/learn-report.ts';
import { learnReportSchema } from '../../calibration/learn-report.ts';
import { writeWhole } from '../../write-whole.ts';
import type { Evaluation } from '../result.ts';
import { evaluationSchema } from '../result.ts';
import { evaluationSections } from './evaluation-sections.ts';
import { learnSections } from './learn-sections.ts';
import { page } from './page.ts';

export const LEARN_REPORT_FILE = 'report.json';
export const EVALUATION_FILE = 'evaluation.json';
export const HTML_FILE = 'report.html';

export type ReportParts = {
  readonly learn?: LearnReport | undefined;
  readonly evaluation?: Evaluation | undefined;
};

export function reportHtml({ learn, evaluation }: ReportParts): string {
  const title = learn?.name ?? `Evaluation of ${evaluation?.model ?? 'nothing'}`;
  return page(title, [
    ...(learn === undefined ? [] : learnSections(learn)),
    ...(evaluation === undefined ? [] : evaluationSections(evaluation)),
  ]);
}

/**
 * Reads what `folder` holds and writes `report.html` there; of files by another version nothing is shown. `learnFrom`:
 * where the learning run's report is taken from when it is not in the folder itself.
 */
export async function writeReportHtml(folder: string, learnFrom: readonly string[] = []): Promise<void> {
  let learn: LearnReport | undefined;
  for (const place of [folder, ...learnFrom]) {
    learn ??= await readAs(join(place, LEARN_REPORT_FILE), learnReportSchema);
  }
  const evaluation = await readAs(join(folder, EVALUATION_FILE), evaluationSchema);
  await writeWhole(join(folder, HTML_FILE), reportHtml({ learn, evaluation }));
}

async function readAs<T>(path: string, schema: z.ZodType<T>): Promise<T | undefined> {
  try {
    return schema.safeParse(JSON.parse(await readFile(path, 'utf8'))).data;
  } catch {
    return undefined;
  }
}
