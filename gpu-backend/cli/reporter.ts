/**
 * Progress of a command with the time left: a bar on a terminal, some lines in a log file, and JSON for a backend that runs
 * the command as a job.
 */
import { Presets, SingleBar } from 'cli-progress';
import type { ImportPhase, ImportProgress } from '../model/model-source.ts';

/** Progress of a pipeline whose stages are known beforehand. */
type WholeRun = {
  /** The stage's number, such as `stage 3 of 8`. */
  readonly stage: string;
  /** What the stage counts. */
  readonly unit: string;
  /** The work of all stages, in one unit; `known`: the part that an earlier run did. */
  readonly work: { readonly done: number; readonly total: number; readonly known: number };
};

export type Reporter = {
  /**
   * Progress of a pipeline: `done` of `total`; a new `stage` ends the previous stage. The time left is that of `run` when
   * given, else the stage's.
   */
  update(stage: string, done: number, total: number, detail?: string, run?: WholeRun): void;
  /** Progress of a download or an import. */
  onProgress(progress: ImportProgress): void;
  /** Prints a line; ends the bar first. */
  log(line: string): void;
  /** Ends the bar, and shows no more progress. */
  stop(): void;
};

/**
 * With `MASKROUTE_PROGRESS=json` a pipeline's progress goes to standard output, as lines for the backend that runs it:
 * `{"progress": {"stage", "done", "total", "left_s", "detail"}}`.
 */
export function createReporter(out: NodeJS.WriteStream = process.stderr, clock: Clock = now): Reporter {
  const people = out.isTTY ? bars(out, clock) : lines(out, clock);
  const asJson = process.env.MASKROUTE_PROGRESS === 'json';
  const pipeline = asJson ? jsonLines((line) => process.stdout.write(line), clock) : people;
  // Work that is under way when other work fails still ends, and would tell of itself behind the error.
  let isOver = false;
  return {
    update(stage, done, total, detail = '', run) {
      if (!isOver) pipeline.show(pipelineStep(stage, done, total, detail, run));
    },
    onProgress(progress) {
      if (!isOver) people.show(importStep(progress));
    },
    log(line) {
      people.stop();
      out.write(`${line}\n`);
    },
    stop() {
      isOver = true;
      people.stop();
    },
  };
}

/** A stage's progress, and its texts. */
type Step = {
  readonly stage: string;
  readonly done: number;
  /** Undefined while unknown. */
  readonly total: number | undefined;
  readonly detail: string;
  readonly run?: WholeRun | undefined;
  /** The format of the bar for cli-progress; `left` is the time left. */
  readonly bar: string;
  /** The number of lines that the stage gets in a log file. */
  readonly lines: number;
  /** The `nth` of these lines. */
  line(nth: number, left_s: number | undefined): string;
};

type Display = { show(step: Step): void; stop(): void };

function pipelineStep(stage: string, done: number, total: number, detail: string, run?: WholeRun): Step {
  const title = run === undefined ? stage : `${run.stage}, ${stage}`;
  const unit = run === undefined ? '' : ` ${run.unit}`;
  const whole = run === undefined ? '' : ' in all';
  return {
    stage: title,
    done,
    total,
    detail,
    run,
    bar: `${title.padEnd(10)} {bar} {value} of {total}${unit}{left} {detail}`,
    lines: 20,
    line(_, left_s) {
      const left = left_s === undefined ? '' : `, ${duration(left_s)} left${whole}`;
      return `${title}: ${done} of ${total}${unit}${left}${detail === '' ? '' : ` (${detail})`}`;
    },
  };
}

const TITLES: Readonly<Record<ImportPhase, string>> = {
  download: 'Downloading',
  unpack: 'Unpacking',
  verify: 'Checking',
  write: 'Writing text',
  convert: 'Converting',
};

function importStep({ phase, done, total, unit }: ImportProgress): Step {
  const title = TITLES[phase];
  const isBytes = unit === 'bytes' && total !== undefined;
  const detail = isBytes ? ` · ${(done / 1e6).toFixed(1)} of ${megabytes(total)}` : '';
  return {
    done,
    total,
    detail,
    // A different stage, so that a bar begins once the total is known.
    stage: total === undefined ? `${title} …` : title,
    bar: `${title.padEnd(12)} {bar} {percentage}%{detail}{left}`,
    lines: 10,
    line: (nth) => `${title} ${total === undefined ? '…' : `${10 * nth}%`}${detail}`,
  };
}

function bars(out: NodeJS.WriteStream, clock: Clock): Display {
  const estimate = createEstimate(clock);
  let bar: SingleBar | undefined;
  let shown: string | undefined;
  const stop = () => {
    bar?.stop();
    bar = undefined;
    shown = undefined;
  };
  return {
    show(step) {
      const { stage, done, total, run, bar: format } = step;
      const { left_s } = estimate(step);
      const left =
        left_s === undefined ? '' : ` · ${duration(left_s)} left${run === undefined ? '' : ' in all'}`;
      const payload = { detail: step.detail, left };
      if (stage !== shown) {
        stop();
        shown = stage;
        // Without a total, the title alone is printed.
        if (total === undefined) out.write(`${stage}\n`);
        else {
          bar = new SingleBar({ stream: out, format, barsize: 30 }, Presets.shades_classic);
          bar.start(total, done, payload);
        }
      }
      if (total !== undefined) bar?.setTotal(total);
      bar?.update(done, payload);
    },
    stop,
  };
}

function lines(out: NodeJS.WriteStream, clock: Clock): Display {
  const estimate = createEstimate(clock);
  let told = -1;
  return {
    show(step) {
      const { isNew, left_s } = estimate(step);
      const { done, total, lines } = step;
      const nth = total ? Math.floor((lines * done) / total) : lines;
      if (!isNew && nth === told) return;
      told = nth;
      out.write(`${step.line(nth, left_s)}\n`);
    },
    stop() {},
  };
}

/** The shortest time between two lines of a stage; the begin and the end of a stage are always written. */
const JSON_EVERY_ms = 250;

function jsonLines(write: (line: string) => void, clock: Clock): Display {
  const estimate = createEstimate(clock);
  let said_ms = Number.NEGATIVE_INFINITY;
  return {
    show(step) {
      const { isNew, left_s = null } = estimate(step);
      const { stage, done, total = done, detail } = step;
      const now_ms = clock();
      if (!isNew && done < total && now_ms - said_ms < JSON_EVERY_ms) return;
      said_ms = now_ms;
      write(`${JSON.stringify({ progress: { stage, done, total, left_s, detail } })}\n`);
    },
    stop() {},
  };
}

/** Milliseconds that only grow. */
type Clock = () => number;
const now: Clock = () => performance.now();

/** The least share of the work and the least time before the first estimate of a whole run. */
const FIRST_ESTIMATE = { part: 0.01, after_ms: 5000 };
/** A time between steps is a pause when it is longer than `least_ms` and than `steps` usual steps. */
const PAUSE = { least_ms: 60_000, steps: 20 };
/** A correction of the estimate is spread over at least `least_s`, and over `part` of the time left. */
const CORRECTION = { least_s: 20, part: 0.25 };

/**
 * Returns for each step whether it begins a stage, and the seconds left. Work of an earlier run does not count for the
 * pace. The estimate of a whole run does not jump: corrections are applied gradually.
 */
export function createEstimate(clock: Clock) {
  const stepClock = withoutPauses(clock);
  let stage: string | undefined;
  let from = { at_ms: 0, done: 0 };
  let said: { left_s: number; at_ms: number } | undefined;
  return ({ stage: next, done, total = done, run }: Pick<Step, 'stage' | 'done' | 'total' | 'run'>) => {
    const at_ms = stepClock();
    const isNew = next !== stage;
    const work = run?.work ?? { done, total, known: 0 };
    // Less work done than before: a new run.
    const isFirst = stage === undefined || (isNew && run === undefined) || work.done < from.done;
    stage = next;
    if (isFirst || work.known > from.done) {
      from = { at_ms, done: isFirst ? work.done : work.known };
      said = undefined;
    }
    const [took_ms, did] = [at_ms - from.at_ms, work.done - from.done];
    const left_s = secondsLeft(took_ms, did, work.total - work.done);
    if (run === undefined || left_s === undefined) return { isNew, left_s };
    if (took_ms < FIRST_ESTIMATE.after_ms || did < FIRST_ESTIMATE.part * work.total)
      return { isNew, left_s: undefined };
    said = { left_s: said === undefined ? left_s : follow(said, left_s, at_ms), at_ms };
    return { isNew, left_s: Math.round(said.left_s) };
  };
}

/** A clock that stands still while the machine sleeps or the process is stopped. Must be asked once a step. */
function withoutPauses(clock: Clock): Clock {
  let [paused_ms, usual_ms] = [0, 0];
  let last_ms: number | undefined;
  return () => {
    const at_ms = clock() - paused_ms;
    const step_ms = at_ms - (last_ms ?? at_ms);
    const isPause = step_ms > Math.max(PAUSE.least_ms, PAUSE.steps * usual_ms);
    if (isPause) paused_ms += step_ms;
    // The second long step in a row is no pause: the machine is slow.
    usual_ms = isPause ? step_ms : (usual_ms + step_ms) / 2;
    last_ms = isPause ? at_ms - step_ms : at_ms;
    return last_ms;
  };
}

/** The last estimate minus the time since, moved a part of the way to the new estimate. */
function follow(said: { left_s: number; at_ms: number }, left_s: number, at_ms: number): number {
  const passed_s = (at_ms - said.at_ms) / 1000;
  const expected_s = Math.max(0, said.left_s - passed_s);
  const over_s = Math.max(CORRECTION.least_s, CORRECTION.part * expected_s);
  return expected_s + (left_s - expected_s) * (1 - Math.exp(-passed_s / over_s));
}

/** Seconds left at the pace so far; undefined while nothing is done. */
export function secondsLeft(took_ms: number, done: number, remaining: number): number | undefined {
  if (done <= 0) return undefined;
  return Math.round((took_ms / 1000 / done) * remaining);
}

/** A duration in words; the longer, the fewer digits. */
export function duration(exact_s: number): string {
  const step_s = exact_s >= 600 ? 60 : exact_s >= 120 ? 10 : 1;
  const seconds = step_s * Math.round(exact_s / step_s);
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (hours > 0) return `${hours} h ${minutes} min`;
  if (minutes === 0) return `${seconds} s`;
  return seconds % 60 === 0 ? `${minutes} min` : `${minutes} min ${seconds % 60} s`;
}

export const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`;
