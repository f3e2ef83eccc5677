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
  let shown = '';
  const stop = () => {
    bar?.stop();
    bar = undefined;
    shown = '';
  };
  return {
    onProgress(progress) {
      const { phase, done, total } = progress;
      // A bar of unknown length says nothing; its title alone does.
      const key = total === undefined ? `${phase} …` : phase;
      if (shown !== key) {
        stop();
        shown = key;
        if (total === undefined) out.write(`${TITLES[phase]} …\n`);
        else bar = startBar(out, phase, total);
      }
      bar?.update(done, { detail: detailOf(progress) });
    },
    log(line) {
      stop();
      out.write(`${line}\n`);
    },
    stop,
  };
}

function startBar(out: NodeJS.WriteStream, phase: ImportPhase, total: number): SingleBar {
  const format = `${TITLES[phase].padEnd(12)} {bar} {percentage}%{detail} · {eta_formatted}`;
  const bar = new SingleBar({ stream: out, format, barsize: 30 }, Presets.shades_classic);
  bar.start(total, 0, { detail: '' });
  return bar;
}

function lineReporter(out: NodeJS.WriteStream): ProgressReporter {
  let shown = '';
  return {
    onProgress(progress) {
      const { phase, done, total } = progress;
      const tenth = total === undefined ? '…' : `${Math.floor((10 * done) / total) * 10}%`;
      const key = `${TITLES[phase]} ${tenth}`;
      if (key === shown) return;
      shown = key;
      out.write(`${key}${detailOf(progress)}\n`);
    },
    log: (line) => out.write(`${line}\n`),
    stop() {},
  };
}

function detailOf({ done, total, unit }: ImportProgress): string {
  if (unit === 'percent' || total === undefined) return '';
  const megabytes = (bytes: number) => (bytes / 1e6).toFixed(1);
  return ` · ${megabytes(done)} of ${megabytes(total)} MB`;
}
