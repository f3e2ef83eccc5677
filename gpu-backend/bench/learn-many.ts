/**
 * `bench learn-many`: a small learning run of the default model on two workers with a thread each, against the same run on
 * one. The queue's server, the workers and the journal are real, and each run begins with an empty journal. Workers have
 * opened the model before the time begins. Both runs must come to the same bytes.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { learn, MASK_SET_FILE } from '../learning/learn.ts';
import { LEARN_EFFORT, type LearnEffort } from '../learning/search/effort.ts';
import { installedSurrogates } from '../learning/search/model-parts.ts';
import { openQueuedUnits } from '../learning/units/queued-units.ts';
import type { BatchUnit, ScoreUnit } from '../learning/units/unit.ts';
import type { OpenUnits } from '../learning/units/units.ts';
import { round } from '../measure.ts';
import { DEFAULT_MODEL } from '../model/sources/default-model.ts';
import { openInstalled } from '../model/store.ts';
import { createRandom } from '../random.ts';
import { startValkey, type Valkey } from './valkey-server.ts';

type LearnManyOptions = { readonly home: string; readonly say: (line: string) => void };

const PROGRAM = fileURLToPath(new URL('../../bin/maskroute.js', import.meta.url));
const ROWS = 120;
/** Of a small run: one mask, on a single batch of text, with each kind of unit in about the share that it has in `learn`. */
const EFFORT: LearnEffort = {
  ...LEARN_EFFORT,
  one: {
    ...LEARN_EFFORT.one,
    ...{ searchPositions: 500, glanceParts: 1, greedyEvaluations: 24, gateSteps: 10, rounds: 0 },
    ...{ exchanges: 6, triesMax: 3 },
  },
  ...{ choicePositions: 1000, heldOutPositions: 600 },
};

export async function benchLearnMany({ home, say }: LearnManyOptions): Promise<object> {
  const model = await openInstalled(home, DEFAULT_MODEL);
  const surrogates = await installedSurrogates(model);
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-learn-many-'));
  await using server = await startValkey();
  try {
    const data = join(folder, 'rows.jsonl');
    await writeFile(data, someRows().join('\n'));
    const measure = async (workers: number): Promise<Measured> => {
      const out = join(folder, `out-${workers}`);
      const journal = join(folder, `units-${workers}`);
      await using machines = startWorkers(workers, server, journal, home);
      const open = openQueuedUnits({ url: server.url, journal, say });
      await warmUp(open, workers, { model, surrogates, threads: 1, signal: undefined });
      const before = machines.units();
      const start_ms = performance.now();
      await learn({
        ...{ model, surrogates, data: [data], clusterCount: 1, sparsity: 0.25, effort: EFFORT, out },
        ...{ encoder: 'static', name: 'bench', openUnits: open, onProgress: () => {} },
        encoderOptions: { home, threads: 1, hooks: { onProgress: () => {}, log: say } },
      });
      const took_s = (performance.now() - start_ms) / 1000;
      const units = machines.units() - before;
      say(`${workers} ${workers === 1 ? 'worker' : 'workers'}: ${took_s.toFixed(1)} s for ${units} units`);
      return { took_s, units, set: await readFile(join(out, MASK_SET_FILE), 'utf8') };
    };
    const one = await measure(1);
    const two = await measure(2);
    if (one.set !== two.set) throw new Error('two workers came to another mask set than one');
    return {
      ...{ bench: 'learn-many', model: model.manifest.name, weights: model.manifest.weights },
      ...{ units: one.units, threadsOfEach: 1 },
      oneWorker_s: round(one.took_s, 1),
      twoWorkers_s: round(two.took_s, 1),
      times: round(one.took_s / two.took_s, 2),
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

type Measured = { readonly took_s: number; readonly units: number; readonly set: string };

type Workers = AsyncDisposable & { units(): number };

function startWorkers(count: number, { url }: Valkey, journal: string, home: string): Workers {
  const args = ['work', '--queue', url, '--journal', journal, '--threads', '1', '--json'];
  let units = 0;
  const children = Array.from({ length: count }, (): ChildProcess => {
    const child = spawn(process.execPath, [PROGRAM, ...args], {
      stdio: ['ignore', 'pipe', 'ignore'],
      env: { ...process.env, MASKROUTE_HOME: home },
    });
    createInterface({ input: child.stdout! }).on('line', () => units++);
    return child;
  });
  return {
    units: () => units,
    async [Symbol.asyncDispose]() {
      await Promise.all(
        children.map(async (child) => {
          if (child.exitCode !== null || child.signalCode !== null) return;
          const ended = once(child, 'exit');
          child.kill('SIGTERM');
          await ended;
        }),
      );
    },
  };
}

/** A unit of every kind for every worker, so that each has all of its sessions open. */
async function warmUp(open: OpenUnits, workers: number, options: Parameters<OpenUnits>[0]): Promise<void> {
  await using units = await open(options);
  const gates = new Array<number>(2 * options.model.manifest.config.layerCount).fill(1);
  for (const kind of ['loss', 'step', 'score'] as const) {
    // Each worker takes one of them: none is done before all are begun.
    await Promise.all(
      Array.from({ length: workers }, (_, seed) => units.run(warmUpUnit(kind, 500 + seed, gates))),
    );
  }
}

function warmUpUnit(
  kind: BatchUnit['kind'] | ScoreUnit['kind'],
  seed: number,
  gates: number[],
): BatchUnit | ScoreUnit {
  const tokenIds = Array.from({ length: 256 }, (_, i) => 100 + ((seed + 7919 * i) % 40_000));
  const scoredRows = tokenIds.slice(0, -1).map((_, i) => i);
  if (kind === 'score')
    return { kind, tokenIds: tokenIds.slice(0, 64), scoreFrom: 0, masks: ['f'.repeat(gates.length / 4)] };
  const batch = { tokenIds, sequences: 1, scoredRows, nextIds: scoredRows.map((i) => tokenIds[i + 1]!) };
  return { kind, targets: 'dense', batch, gates };
}

/** Sentences of everyday words: what they say makes no difference to the time. */
function someRows(): string[] {
  const words =
    'the a blue old train house walks sings near under quickly bread river answer to of and'.split(' ');
  const random = createRandom(7);
  return Array.from({ length: ROWS }, () => {
    const text = Array.from({ length: 40 }, () => words[random.below(words.length)]).join(' ');
    return JSON.stringify({ text });
  });
}
