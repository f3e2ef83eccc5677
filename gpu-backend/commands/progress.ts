/** Progress of an import on a terminal: one bar a phase; in a log file: a line at every tenth. */
import { Presets, SingleBar } from 'cli-progress';
import type { ImportPhase, ImportProgress } from '../model/progress.ts';

const TITLES: Readonly<Record<ImportPhase, string>> = {
  download: 'Downloading',
  unpack: 'Unpacking',
  verify: 'Checking',
  convert: 'Converting',
};

export type ProgressReporter = {
  onProgress(progress: ImportProgress): void;
  /** A line of text that does not tear the bar. */
  log(line: string): void;
  stop(): void;
};

export function createProgressReporter(out: NodeJS.WriteStream = process.stderr): ProgressReporter {
  return out.isTTY ? barReporter(out) : lineReporter(out);
}

function barReporter(out: NodeJS.WriteStream): ProgressReporter {
  let bar: SingleBar | undefined;
  let phase: ImportPhase | undefined;
  const stop = () => {
    bar?.stop();
    bar = undefined;
    phase = undefined;
  };
  return {
    onProgress(progress) {
      if (phase !== progress.phase) {
        stop();
        phase = progress.phase;
        bar = new SingleBar(
          {
            stream: out,
            format: `${TITLES[progress.phase].padEnd(12)} {bar} {percentage}% · {detail} · {eta_formatted}`,
          },
          Presets.shades_classic,
        );
        bar.start(progress.total ?? 0, 0, { detail: '' });
      }
      if (progress.total !== undefined) bar?.setTotal(progress.total);
      bar?.update(progress.done, { detail: detailOf(progress) });
    },
    log(line) {
      stop();
      out.write(`${line}\n`);
    },
    stop,
  };
}

function lineReporter(out: NodeJS.WriteStream): ProgressReporter {
  let shown = '';
  return {
    onProgress(progress) {
      const tenth = progress.total ? Math.floor((10 * progress.done) / progress.total) : 0;
      const key = `${progress.phase} ${tenth}`;
      if (key === shown) return;
      shown = key;
      out.write(`${TITLES[progress.phase]} ${tenth * 10}% (${detailOf(progress)})\n`);
    },
    log: (line) => out.write(`${line}\n`),
    stop() {},
  };
}

function detailOf({ done, total, unit }: ImportProgress): string {
  if (unit === 'percent') return `${Math.round(done)} of ${total} percent`;
  const megabytes = (bytes: number) => (bytes / 1e6).toFixed(1);
  return total === undefined ? `${megabytes(done)} MB` : `${megabytes(done)} of ${megabytes(total)} MB`;
}
