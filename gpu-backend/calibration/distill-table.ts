/** `maskroute distill`: calibration files in, a table for the static encoder out. */
import { rename, rm, writeFile } from 'node:fs/promises';
import { openFullEncoder } from '../encoder/full-encoder.ts';
import type { ImportHooks } from '../model/progress.ts';
import type { Distilled, DistillOptions } from './distill.ts';
import { DISTILL_DEFAULTS, distill } from './distill.ts';
import { readData } from './read-data.ts';
import { snippets } from './snippets.ts';

/** Enough sentences of a long document to meet its words, few enough that it does not outweigh the rest. */
const SENTENCES_PER_ROW_MAX = 12;

export type DistillTableOptions = {
  /** As `openFullEncoder` takes it. */
  readonly encoder: string;
  readonly data: readonly string[];
  readonly out: string;
  readonly home: string;
  readonly threads: number;
  readonly dimensions?: number;
  readonly seed?: number;
  readonly hooks: ImportHooks;
  readonly onProgress: NonNullable<DistillOptions['onProgress']>;
  readonly signal?: AbortSignal;
};

/** Writes the table whole or not at all. @throws MaskrouteError `invalid_data`, `invalid_encoder`, `download_failed`. */
export async function distillTable(options: DistillTableOptions): Promise<Distilled['report']> {
  const { encoder, data, out, home, threads, hooks, onProgress, signal } = options;
  const { rows } = await readData(data);
  const teacher = await openFullEncoder(encoder, { home, threads, hooks });
  try {
    const settings = {
      dimensions: options.dimensions ?? DISTILL_DEFAULTS.dimensions,
      epochs: DISTILL_DEFAULTS.epochs,
      seed: options.seed ?? DISTILL_DEFAULTS.seed,
      onProgress,
    };
    const texts = snippets(rows, SENTENCES_PER_ROW_MAX);
    const { table, report } = await distill(teacher, texts, settings, signal);
    const part = `${out}.part`;
    try {
      await writeFile(part, table, { flush: true });
      await rename(part, out);
    } catch (error) {
      await rm(part, { force: true });
      throw error;
    }
    return report;
  } finally {
    await teacher.close();
  }
}
