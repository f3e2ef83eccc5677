/** What several commands do with their arguments, and with Ctrl-C. */

import { Presets, SingleBar } from 'cli-progress';
import { InvalidArgumentError } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ImportPhase, ImportProgress } from '../model/model-source.ts';

export const DATA_HELP =
  'JSONL rows with messages, prompt + completion, question + answer, instruction + output, or text';

/** Ctrl-C ends the work in good order: nothing half-written, and the same command can go on later. */
export async function interruptible(work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const interrupted = new AbortController();
  const stop = () => interrupted.abort();
  process.once('SIGINT', stop).once('SIGTERM', stop);
  try {
    await work(interrupted.signal);
  } catch (error) {
    if (!interrupted.signal.aborted) throw error;
    console.error('Stopped.');
    process.exitCode = 130;
  }
}

export function wholeNumber(min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (/^\d+$/.test(text) && value >= min && value <= max) return value;
    throw new InvalidArgumentError(`expected a whole number from ${min} to ${max}`);
  };
}

/** Some of the whole, neither none nor all. */
export function part(text: string): number {
  const value = Number(text);
  if (text.trim() !== '' && value > 0 && value < 1) return value;
  throw new InvalidArgumentError('expected a number between 0 and 1, such as 0.125');
}

export function share(text: string): number {
  const value = Number(text);
  if (text.trim() !== '' && value >= 0 && value < 1) return value;
  throw new InvalidArgumentError('expected a number from 0 to 1, such as 0.125');
}

/** From the environment; 0 means any free one. @throws MaskrouteError `invalid_argument` unless it is absent or a port. */
export function portFrom(name: string, preset: number): number {
  const text = process.env[name];
  if (text === undefined || text === '') return preset;
  const port = Number(text);
  if (/^\d+$/.test(text) && port <= 65_535) return port;
  throw new MaskrouteError('invalid_argument', `${name} must be a port from 0 to 65535, not "${text}".`);
}

/* Progress of an import on a terminal: one bar a phase; in a log file: a line at every tenth. */

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

/*
 * Progress of a long pipeline: one bar a stage on a terminal, in a log file a line at every twentieth, and with
 * `MASKROUTE_PROGRESS=json` a JSON line a change on standard output for a program; all with the time left.
 */

export type Stages = {
  /** `done` of `total`; a new `stage` ends the one before. */
  update(stage: string, done: number, total: number, detail?: string): void;
  stop(): void;
};

export function createStages(out: NodeJS.WriteStream = process.stderr): Stages {
  if (process.env.MASKROUTE_PROGRESS === 'json') return jsonStages((line) => process.stdout.write(line));
  return out.isTTY ? barStages(out) : lineStages(out);
}

function barStages(out: NodeJS.WriteStream): Stages {
  let bar: SingleBar | undefined;
  let current: string | undefined;
  const stop = () => {
    bar?.stop();
    bar = undefined;
    current = undefined;
  };
  return {
    update(stage, done, total, detail = '') {
      if (stage !== current) {
        stop();
        current = stage;
        const format = `${stage.padEnd(10)} {bar} {value} of {total} · {eta_formatted} left {detail}`;
        bar = new SingleBar({ stream: out, format, etaBuffer: 20 }, Presets.shades_classic);
        bar.start(total, done, { detail });
      }
      bar?.setTotal(total);
      bar?.update(done, { detail });
    },
    stop,
  };
}

/** How often at most a program hears of the same stage; it hears of every stage's begin and end. */
const JSON_EVERY_ms = 250;

/** Lines of `{"progress": {"stage", "done", "total", "left_s", "detail"}}`. */
export function jsonStages(write: (line: string) => void): Stages {
  let current = { stage: '', start_ms: 0, startDone: 0 };
  let said_ms = Number.NEGATIVE_INFINITY;
  return {
    update(stage, done, total, detail = '') {
      const now_ms = performance.now();
      const isNew = stage !== current.stage;
      if (isNew) current = { stage, start_ms: now_ms, startDone: done };
      if (!isNew && done < total && now_ms - said_ms < JSON_EVERY_ms) return;
      said_ms = now_ms;
      const left_s = secondsLeft(now_ms - current.start_ms, done - current.startDone, total - done) ?? null;
      write(`${JSON.stringify({ progress: { stage, done, total, left_s, detail } })}\n`);
    },
    stop() {},
  };
}

const LINES_A_STAGE = 20;

function lineStages(out: NodeJS.WriteStream): Stages {
  let current = { stage: '', start_ms: 0, startDone: 0, step: -1 };
  return {
    update(stage, done, total, detail = '') {
      const now_ms = performance.now();
      if (stage !== current.stage) current = { stage, start_ms: now_ms, startDone: done, step: -1 };
      const step = total === 0 ? LINES_A_STAGE : Math.floor((LINES_A_STAGE * done) / total);
      if (step === current.step) return;
      current.step = step;
      const left_s = secondsLeft(now_ms - current.start_ms, done - current.startDone, total - done);
      const left = left_s === undefined ? '' : `, ${duration(left_s)} left`;
      out.write(`${stage}: ${done} of ${total}${left}${detail === '' ? '' : ` (${detail})`}\n`);
    },
    stop() {},
  };
}

/** At the pace so far; undefined while nothing is known about it. */
export function secondsLeft(took_ms: number, done: number, remaining: number): number | undefined {
  if (done <= 0) return undefined;
  return Math.round((took_ms / 1000 / done) * remaining);
}

export function duration(seconds: number): string {
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (hours > 0) return `${hours} h ${minutes} min`;
  return minutes > 0 ? `${minutes} min ${seconds % 60} s` : `${seconds} s`;
}
