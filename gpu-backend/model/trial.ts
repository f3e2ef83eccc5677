/**
 * Tries a model's tokenizer and chat template before it is taken in. Both are programs from a stranger (regular
 * expressions, a template language): they run in a process whose time and memory are bounded, so that a program that
 * never ends is refused here and not in the server. (A worker thread is not enough: running out of memory in one
 * can take the whole process down.)
 */
import { spawn } from 'node:child_process';
import { text } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { unsupportedModel } from './model-source.ts';
import type { TextManifest } from './tokenizer/model-text.ts';
import { openModelText } from './tokenizer/model-text.ts';

/** A second on an idle machine, several on one with twenty things to do. */
const TRIAL_TIMEOUT_ms = 20_000;
/** Room for the largest tokenizers (a quarter of a million tokens); a template that hoards ends in it. */
const TRIAL_HEAP_MB = 512;
const REASON_CHARS_MAX = 300;

/** `folder` holds the tokenizer's files. @throws MaskrouteError `unsupported_model`. */
export async function tryModelText(folder: string, manifest: TextManifest): Promise<void> {
  const child = spawn(
    process.execPath,
    [`--max-old-space-size=${TRIAL_HEAP_MB}`, fileURLToPath(import.meta.url), folder],
    { stdio: ['pipe', 'pipe', 'ignore'], timeout: TRIAL_TIMEOUT_ms, killSignal: 'SIGKILL' },
  );
  // A child that dies early breaks the pipe; its exit says so better.
  child.stdin.on('error', () => {});
  const { chatTemplate, bosTokenId, eosTokenIds } = manifest;
  child.stdin.end(JSON.stringify({ chatTemplate, bosTokenId, eosTokenIds }));
  const [reason, status] = await Promise.all([
    text(child.stdout),
    new Promise<number | null>((resolve, reject) => {
      child.once('error', reject);
      child.once('exit', resolve);
    }),
  ]);
  if (status === 0) return;
  const limits = `it takes more than ${TRIAL_TIMEOUT_ms / 1000} s or ${TRIAL_HEAP_MB} MB for a greeting`;
  const said = reason === '' ? limits : reason.slice(0, REASON_CHARS_MAX);
  throw unsupportedModel(`its tokenizer or chat template does not work: ${said}`);
}

/** Kinds of text that every tokenizer must give back unchanged. */
const SAMPLES = [
  'Hello, world!  Two spaces,\n\ta tab, 1234567890 and ½.',
  'Ünïcödé ist überall: 漢字, हिन्दी, العربية, 👩‍🚀.',
  'def f(x):\n    return {"a": [x ** 2 for x in range(10)]}  # code\r\n',
];

async function trial(folder: string, manifest: TextManifest): Promise<void> {
  const model = await openModelText(folder, manifest);
  for (const sample of SAMPLES) {
    const back = model.tokenizer.decode(model.tokenizer.encode(sample, { addSpecial: false }));
    if (back !== sample) throw new Error(`${JSON.stringify(sample)} comes back as ${JSON.stringify(back)}`);
  }
  try {
    model.encodeChat([{ role: 'user', content: 'Hello' }]);
  } catch (error) {
    // Refusing a conversation is a template's right.
    if (!(error instanceof MaskrouteError) || error.code !== 'invalid_request') throw error;
  }
}

if (import.meta.main) {
  try {
    await trial(process.argv[2]!, JSON.parse(await text(process.stdin)));
  } catch (error) {
    process.stdout.write((error as Error).message);
    process.exitCode = 1;
  }
}
