/**
 * Tries a chat template before the model is taken in. A template is a program from a stranger: it runs in a process
 * whose time and memory are bounded, so that one that never ends is refused here and not in the server. (A worker
 * thread is not enough: running out of memory in one can take the whole process down.)
 */
import { spawn } from 'node:child_process';
import { text } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { createChatTemplate } from './chat-template.ts';
import { unsupportedModel } from './model-errors.ts';

const TRIAL_TIMEOUT_ms = 5000;
const TRIAL_HEAP_MB = 192;

/** @throws MaskrouteError `unsupported_model`. A template that refuses the trial's messages is none the worse. */
export async function tryChatTemplate(template: string): Promise<void> {
  createChatTemplate(template, { bos: '', eos: '' });
  const script = fileURLToPath(import.meta.url);
  const child = spawn(process.execPath, [`--max-old-space-size=${TRIAL_HEAP_MB}`, script], {
    stdio: ['pipe', 'ignore', 'ignore'],
    timeout: TRIAL_TIMEOUT_ms,
    killSignal: 'SIGKILL',
  });
  // A child that dies early breaks the pipe; its exit says so better.
  child.stdin.on('error', () => {});
  child.stdin.end(template);
  const status = await new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', resolve);
  });
  if (status !== 0) {
    const limits = `${TRIAL_TIMEOUT_ms / 1000} s and ${TRIAL_HEAP_MB} MB`;
    throw unsupportedModel(`its chat template does not render a greeting within ${limits}`);
  }
}

if (import.meta.main) {
  const template = createChatTemplate(await text(process.stdin), { bos: '<s>', eos: '</s>' });
  try {
    template.render([{ role: 'user', content: 'Hello' }]);
  } catch {
    // Refusing a conversation is a template's right.
  }
}
