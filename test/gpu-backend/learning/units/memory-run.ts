/**
 * As a program (`memory-run.ts HOME MODEL MEMORY_BYTES [TURNS]`): one unit of every kind, of the size that `learn` asks for, in
 * a process of its own. It prints what they came to, how long each took, and the most memory that the process had.
 */
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { batchSamples } from '../../../../gpu-backend/learning/gates/batches.ts';
import { fastestRounding } from '../../../../gpu-backend/learning/gates/rounding.ts';
import { LOSS_BATCH_TOKENS, STEP_PART_TOKENS } from '../../../../gpu-backend/learning/gates/step-memory.ts';
import { batchUnit, scoreUnit } from '../../../../gpu-backend/learning/units/unit.ts';
import { openUnitComputer } from '../../../../gpu-backend/learning/units/unit-computer.ts';
import { openInstalled } from '../../../../gpu-backend/model/store.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { denseMask, maskFromSkippedLayers } from '../../../../shared/mask/mask.ts';

const [home, name, memory, turns = '1'] = process.argv.slice(2) as [string, string, string, string?];
const model = await openInstalled(home, name);
const { layerCount, vocabularySize } = model.manifest.config;
const random = createRandom(5);
const sampleTokens = 128;
const samples = (tokens: number) =>
  Array.from({ length: tokens / sampleTokens }, () => ({
    tokenIds: Int32Array.from({ length: sampleTokens }, () => random.below(vocabularySize)),
    scoreFrom: 0,
  }));
const gates = Array.from({ length: 2 * layerCount }, (_, i) => (i % 3 === 0 ? 0.5 : 1));
const without = maskFromSkippedLayers(2 * layerCount, { skipAttention: [1], skipFfn: [1] });
const units = {
  loss: batchUnit('loss', 'dense', batchSamples(samples(LOSS_BATCH_TOKENS), LOSS_BATCH_TOKENS)[0]!, gates),
  step: batchUnit('step', 'dense', batchSamples(samples(STEP_PART_TOKENS), STEP_PART_TOKENS)[0]!, gates),
  score: scoreUnit(samples(sampleTokens)[0]!, [denseMask(2 * layerCount), without]),
};
const computer = openUnitComputer({
  model,
  surrogates: undefined,
  threads: availableParallelism(),
  rounding: await fastestRounding(),
  memory_bytes: Number(memory),
});
const numbers: Record<string, number[]> = {};
const seconds: Record<string, number[]> = {};
const peaks: Record<string, number> = {};
const peak_bytes = () =>
  1024 * Number(/^VmHWM:\s+(\d+) kB/m.exec(readFileSync('/proc/self/status', 'utf8'))![1]);
for (const [kind, unit] of Object.entries(units)) {
  const times: number[] = [];
  for (let turn = 0; turn < Number(turns); turn++) {
    const begun_ms = performance.now();
    numbers[kind] = await computer.run(unit);
    times.push((performance.now() - begun_ms) / 1000);
  }
  seconds[kind] = times;
  peaks[kind] = peak_bytes();
}
await computer[Symbol.asyncDispose]();
console.log(JSON.stringify({ numbers, seconds, peaks, peak_bytes: peak_bytes() }));
