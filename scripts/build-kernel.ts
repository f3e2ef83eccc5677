/** Assembles the static encoder's kernel. What it writes is committed, so that nobody needs an assembler to start. */
import { readFile, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import wabt from 'wabt';

const SOURCE = fileURLToPath(new URL('../shared/embedding/weighted-sum.wat', import.meta.url));

/** The module's bytes. @throws Error naming the line that is wrong. */
export async function assembleKernel(): Promise<Uint8Array> {
  const { parseWat } = await wabt();
  const module = parseWat(SOURCE, await readFile(SOURCE, 'utf8'), { simd: true });
  try {
    module.validate();
    return module.toBinary({}).buffer;
  } finally {
    module.destroy();
  }
}

if (import.meta.main) await writeFile(SOURCE.replace(/wat$/, 'wasm'), await assembleKernel());
