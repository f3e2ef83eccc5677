/** What a start is at: a spinner and a tick on a terminal, a line for each finished step elsewhere. */
import yoctoSpinner from 'yocto-spinner';

/** Shows `title` while `work` goes on, and a tick with the time that it took. @throws what `work` throws. */
export type Step = <T>(title: string, work: () => Promise<T>) => Promise<T>;

export function createStep(out: NodeJS.WriteStream = process.stdout): Step {
  return async (title, work) => {
    const start_ms = performance.now();
    // A stop by signal is the caller's business: running answers finish first.
    const spinner = yoctoSpinner({ text: title, stream: out, handleSignals: false });
    if (out.isTTY) spinner.start();
    try {
      const result = await work();
      const took_s = ((performance.now() - start_ms) / 1000).toFixed(1);
      if (out.isTTY) spinner.success(`${title} (${took_s} s)`);
      else out.write(`✔ ${title} (${took_s} s)\n`);
      return result;
    } catch (error) {
      if (out.isTTY) spinner.error();
      else out.write(`✖ ${title}\n`);
      throw error;
    }
  };
}
