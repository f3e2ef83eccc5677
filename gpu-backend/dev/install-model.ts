/** Installs a model with its progress on the terminal, unless it is there. */
import { pullModel } from '../commands/model.ts';
import { createProgressReporter } from '../commands/progress.ts';

export async function installModel(home: string, name: string, signal: AbortSignal): Promise<void> {
  const { stop, ...hooks } = createProgressReporter();
  try {
    await pullModel(name, { home, weights: 'q8', signal, ...hooks });
  } finally {
    stop();
  }
}
