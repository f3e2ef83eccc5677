/** PyTorch as the other side of `bench learn`, in a Python process that steps when told to (`learn-peer.py`). */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import type { Subject } from '../measure.ts';

const SCRIPT = fileURLToPath(new URL('./learn-peer.py', import.meta.url));
const readySchema = z.object({ torch: z.string(), transformers: z.string() });
const stepSchema = z.object({ ms: z.number(), loss: z.number() });

export type TorchPeer =
  | { readonly version: string; readonly subjects: readonly Subject[]; close(): void }
  /** Why there is no peer to measure. */
  | { readonly problem: string };

export type TorchPeerOptions = {
  readonly file: string;
  readonly sequences: number;
  readonly tokens: number;
  readonly threads: number;
};

/** Starts Python; a machine without Python or PyTorch gives a reason and no error. */
export async function openTorchPeer(options: TorchPeerOptions): Promise<TorchPeer> {
  const { file, sequences, tokens, threads } = options;
  if (!existsSync(file)) return { problem: `the model's GGUF file is not there` };
  const python = spawn('python3', [SCRIPT, file, `${sequences}`, `${tokens}`, `${threads}`], {
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  let errors = '';
  python.stderr.on('data', (chunk) => {
    errors = `${errors}${chunk}`.slice(-2000);
  });
  python.on('error', (error) => {
    errors = error.message;
  });
  // A broken pipe shows as the end of its output.
  python.stdin.on('error', () => {});
  const lines = createInterface({ input: python.stdout })[Symbol.asyncIterator]();
  const ready = await lines.next();
  if (ready.done) return { problem: errors.trim().split('\n').at(-1) || 'python3 ended without a word' };
  const { torch } = readySchema.parse(JSON.parse(ready.value));
  const subject = (name: string): Subject => ({
    name,
    async measure() {
      python.stdin.write(`${name}\n`);
      const line = await lines.next();
      if (line.done) throw new Error(`PyTorch's side ended: ${errors.trim().split('\n').at(-1)}`);
      return stepSchema.parse(JSON.parse(line.value)).ms;
    },
  });
  return { version: torch, subjects: [subject('fp32'), subject('bf16')], close: () => python.stdin.end() };
}
