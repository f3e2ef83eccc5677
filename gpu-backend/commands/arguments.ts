/** What several commands do with their arguments, and with Ctrl-C. */
import { InvalidArgumentError } from 'commander';

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
