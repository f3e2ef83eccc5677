/**
 * The worker's thread that computes units, one at a time: a unit blocks its thread, and a worker that does not answer
 * meanwhile loses its lease.
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
  /** @throws Error with the thread's message; MaskrouteError `engine_failed` when the thread ends. */
  run(unit: Unit): Promise<number[]>;
  /** Also stops within a unit, as soon as the runtime returns from its current run. */
  close(): Promise<void>;
};

export function openUnitThread(options: ThreadOptions): UnitThread {
  const thread = new Worker(new URL(import.meta.url), { workerData: options });
  // It rejects with the thread's uncaught error.
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
      // Not `terminate`: ONNX Runtime crashes the whole process when it returns into a thread that is being terminated.
      thread.postMessage(CLOSE);
      await ended;
    },
  };
}

function serve(port: NonNullable<typeof parentPort>): void {
  const computer = openUnitComputer(workerData as ThreadOptions);
  port.on('message', async (unit: Unit | typeof CLOSE) => {
    // Ends only this thread.
    if (unit === CLOSE) process.exit();
    const answer: Answer = await computer.run(unit).then(
      (values) => ({ type: 'done', values }),
      (error: Error) => ({ type: 'failed', reason: error.message }),
    );
    port.postMessage(answer);
  });
}

if (parentPort !== null) serve(parentPort);
