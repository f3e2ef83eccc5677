/**
 * Progress of a long pipeline: one bar a stage on a terminal, in a log file a line at every twentieth, and with
 * `MASKROUTE_PROGRESS=json` a JSON line a change on standard output for a program; all with the time left.
 */
import { Presets, SingleBar } from 'cli-progress';

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
