/** Installs a model with its progress on the terminal, unless it is there. */
import { pullModel } from '../cli/models.ts';
import { createProgressReporter } from '../cli/terminal.ts';

export async function installModel(home: string, name: string, signal: AbortSignal): Promise<void> {
  const { stop, ...hooks } = createProgressReporter();
  try {
    await pullModel(name, { home, weights: 'q8', signal, ...hooks });
  } finally {
    stop();
  }
}
