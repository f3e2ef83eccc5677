/**
 * The thread of a worker in which units are computed: the runtime holds a thread for as long as a unit takes, and a worker
 * that does not answer meanwhile loses its lease. One unit at a time.
 */
import { once } from 'node:events';
import { parentPort, Worker, workerData } from 'node:worker_threads';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { Unit } from './unit.ts';
import { openUnitComputer } from './unit-computer.ts';
import type { UnitsOptions } from './units.ts';

type ThreadOptions = Omit<UnitsOptions, 'signal'>;

const CLOSE = 'close';

type Answer =
  | { readonly type: 'done'; readonly values: number[] }
  | { readonly type: 'failed'; readonly reason: string };

export type UnitThread = {
  /** @throws Error with what the thread says; MaskrouteError `engine_failed` when it ends. */
  run(unit: Unit): Promise<number[]>;
  /** In mid-unit, too: as soon as the runtime returns from the run that it is at. */
  close(): Promise<void>;
};

export function openUnitThread(options: ThreadOptions): UnitThread {
  const thread = new Worker(new URL(import.meta.url), { workerData: options });
  // It rejects with an error that nobody caught there.
  const ended = once(thread, 'exit').then(
    () => 'it was closed',
    (error: Error) => error.message,
  );
  return {
    async run(unit) {
      thread.postMessage(unit);
      const answer: Answer | string = await Promise.race([
        once(thread, 'message').then(([message]) => message as Answer),
        ended,
      ]);
      if (typeof answer === 'string')
        throw new MaskrouteError('engine_failed', `The thread that computes units ended: ${answer}.`);
      if (answer.type === 'failed') throw new Error(answer.reason);
      return answer.values;
    },
    async close() {
      // Not `terminate`: the runtime ends the whole process when it returns into a thread that is being terminated.
      thread.postMessage(CLOSE);
      await ended;
    },
  };
}

function serve(port: NonNullable<typeof parentPort>): void {
  const computer = openUnitComputer(workerData as ThreadOptions);
  port.on('message', async (unit: Unit | typeof CLOSE) => {
    // Ends this thread alone.
    if (unit === CLOSE) process.exit();
    const answer: Answer = await computer.run(unit).then(
      (values) => ({ type: 'done', values }),
      (error: Error) => ({ type: 'failed', reason: error.message }),
    );
    port.postMessage(answer);
  });
}

if (parentPort !== null) serve(parentPort);
