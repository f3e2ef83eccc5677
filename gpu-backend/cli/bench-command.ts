/** `bench …`: measures speed. The last line of output is one JSON object; with `--json` it is the only line. */
import { fileURLToPath } from 'node:url';
import { type Command, Option } from 'commander';
import { maskSetVersion } from '../../shared/mask/mask-set.ts';
import type { DecodeOptions } from '../bench/decode.ts';
import { maskrouteHome } from '../files.ts';
import type { BenchHooks } from '../measure.ts';
import { type KvType, WEIGHT_KINDS, type WeightKind } from '../model/model-source.ts';
import { DEFAULT_MODEL } from '../model/sources/resolve.ts';
import type { Device } from '../onnx/device.ts';
import { readMaskSet } from '../publication/publish.ts';
import { examples } from './help.ts';
import {
  chosenDevice,
  computingThreads,
  DATA_HELP,
  type DeviceFlags,
  deviceOption,
  floatTypeOption,
  interruptible,
  kvTypeOption,
  rank,
  wholeNumber,
} from './terminal.ts';

const PRESET = fileURLToPath(new URL(`../presets/${DEFAULT_MODEL}/mask-set.json`, import.meta.url));
const MODEL = ['--model <name>', 'an installed model', DEFAULT_MODEL] as const;
const ROUNDS = ['--rounds <count>', 'interleaved rounds; their median is reported', wholeNumber(1)] as const;
const LONG = ['--long', 'contexts of 2,048, 4,096 and 8,000 tokens; takes minutes a round', false] as const;
const maskSetOption = () =>
  new Option('--mask-set <file>', 'the mask set to route by').default(PRESET, 'the preset');

type BenchFlags = { readonly json: boolean };
type OnDevice = BenchFlags & DeviceFlags;
type DecodeFlags = { model: string; kvType?: KvType; rounds: number; long: boolean };
type MasksFlags = { model: string; steps: number; prefill: boolean; layers?: number; rounds: number };
type QuantizationFlags = { data: string[]; positions: number; maskSet: string[]; rounds: number };

export function addBenchCommands(program: Command): void {
  const bench = program
    .command('bench')
    .description('measure speed; the last line is one JSON object')
    .addHelpText('after', examples('maskroute bench decode', 'maskroute bench edge --stream --json'));

  addDecodingBenches(bench);
  addModelBenches(bench);
  addLearningBenches(bench);
  addQualityBenches(bench);
  addEdgeBenches(bench);
}

function addDecodingBenches(bench: Command): void {
  command(bench, 'decode', 'ms/token when decoding, dense and masked, against llama.cpp')
    .option(...MODEL)
    .option(...ROUNDS, 7)
    .option(...LONG)
    .addOption(deviceOption())
    .addOption(floatTypeOption())
    .addOption(kvTypeOption())
    .action(async ({ json, device, floatType, ...flags }: OnDevice & DecodeFlags) => {
      const { decode } = await benchesOn({ device, floatType }, flags.model);
      await told(json, (hooks) => decode({ home: maskrouteHome(), ...flags, ...hooks }));
    });

  command(bench, 'prefill', 'ms to prefill a prompt of 512 tokens, against llama.cpp')
    .option(...MODEL)
    .option(...ROUNDS, 7)
    .option(...LONG)
    .action(async ({ json, ...flags }: BenchFlags & Omit<DecodeFlags, 'kvType'>) => {
      const { benchPrefill } = await import('../bench/decode.ts');
      await told(json, (hooks) => benchPrefill({ home: maskrouteHome(), ...flags, ...hooks }));
    });

  command(
    bench,
    'masks',
    'what skipping blocks saves when decoding and in prefill, by kind of block; and its memory',
  )
    .option(...MODEL)
    .option('--steps <count>', 'tokens decoded for each figure', wholeNumber(1), 8)
    .option('--no-prefill', 'leave prefill out')
    .option('--layers <count>', 'report figures for a model of so many such layers', wholeNumber(1))
    .option(...ROUNDS, 3)
    .action(async ({ json, ...flags }: BenchFlags & MasksFlags) => {
      const { benchMasks } = await import('../bench/masks-bench.ts');
      await told(json, (hooks) => benchMasks({ home: maskrouteHome(), ...flags, ...hooks }));
    });

  command(bench, 'batch', 'tokens/s of eight streams, under one mask and under eight, against llama.cpp')
    .option(...MODEL)
    .option(...ROUNDS, 3)
    .addOption(deviceOption())
    .addOption(floatTypeOption())
    .addOption(kvTypeOption())
    .action(async ({ json, device, floatType, ...flags }: OnDevice & Omit<DecodeFlags, 'long'>) => {
      const { batch } = await benchesOn({ device, floatType }, flags.model);
      await told(json, (hooks) => batch({ home: maskrouteHome(), ...flags, ...hooks }));
    });

  command(bench, 'prediction', 'ms/token of an answer that its client, or prompt lookup, predicts')
    .option(...MODEL)
    .option(...ROUNDS, 5)
    .action(async ({ json, ...flags }: BenchFlags & { model: string; rounds: number }) => {
      const { benchPrediction } = await import('../bench/prediction-bench.ts');
      await told(json, (hooks) => benchPrediction({ home: maskrouteHome(), ...flags, ...hooks }));
    });

  command(bench, 'prefix', 'ms to the first token when 400 tokens of the prompt are cached')
    .option(...ROUNDS, 7)
    .addOption(deviceOption())
    .addOption(floatTypeOption())
    .action(async ({ json, rounds, ...flags }: OnDevice & { rounds: number }) => {
      const { benchPrefix } = await import('../bench/batch.ts');
      const device = await deviceFor(DEFAULT_MODEL, flags);
      await told(json, (hooks) => benchPrefix({ home: maskrouteHome(), rounds, device, ...hooks }));
    });
}

function addModelBenches(bench: Command): void {
  command(bench, 'import', 'seconds and memory of importing a model, beside what the disk and the CPU allow')
    .argument('<spec>', 'a file or folder')
    .addOption(
      new Option('--weights <kind>', 'the format of the weights').choices(WEIGHT_KINDS).default('q8'),
    )
    .option('--home <folder>', 'where to install the model for good (default: it is removed afterwards)')
    .action(async (spec: string, { json, ...flags }: BenchFlags & { weights: WeightKind; home?: string }) => {
      const { benchImport } = await import('../bench/import-bench.ts');
      const { home, weights } = flags;
      await told(json, (hooks) => benchImport({ spec, weights, home, ...hooks }));
    });

  command(bench, 'encode', 'ms to embed a prompt, tokenization included')
    .option('--encoder <name>', 'a full encoder, measured in short texts/s (default: the static one)')
    .action(async ({ json, encoder }: BenchFlags & { encoder?: string }) => {
      const { benchEncode, benchFullEncoder } = await import('../bench/route-bench.ts');
      if (encoder === undefined) await told(json, benchEncode);
      else await told(json, (hooks) => benchFullEncoder(encoder, maskrouteHome(), hooks));
    });
}

function addLearningBenches(bench: Command): void {
  command(bench, 'learn', 'ms of a training step of the gates, against PyTorch where Python has it')
    .option(...ROUNDS, 5)
    .action(async ({ json, rounds }: BenchFlags & { rounds: number }) => {
      const { benchLearn } = await import('../bench/learn-bench.ts');
      await told(json, (hooks) => benchLearn({ home: maskrouteHome(), rounds, ...hooks }));
    });

  command(
    bench,
    'learn-many',
    'a learning run on two workers of one thread against one worker; needs valkey-server, takes minutes',
  ).action(async ({ json }: BenchFlags) => {
    const { benchLearnMany } = await import('../bench/learn-bench.ts');
    await told(json, (hooks) => benchLearnMany({ home: maskrouteHome(), ...hooks }));
  });
}

function addQualityBenches(bench: Command): void {
  command(
    bench,
    'ranks',
    'the KL that a rank of surrogates saves and the time that it costs; takes minutes a rank',
  )
    .requiredOption('--data <file...>', DATA_HELP)
    .option('--ranks <numbers>', 'ranks to compare, multiples of 32', ranks, [32, 64, 128, 256])
    .option(...ROUNDS, 7)
    .action(async ({ json, ...flags }: BenchFlags & { data: string[]; ranks: number[]; rounds: number }) => {
      const { benchRanks } = await import('../bench/quality-bench.ts');
      const options = { ...flags, home: maskrouteHome(), threads: computingThreads() };
      await told(json, (hooks) => benchRanks({ ...options, ...hooks }));
    });

  command(
    bench,
    'quantization',
    'speed and quality of q4, q8 and q8-columns beside f32, dense and masked; needs f32, q8 and q4 installed',
  )
    .requiredOption('--data <file...>', `${DATA_HELP}; each file is a kind of text`)
    .option('--positions <count>', 'scored positions of each kind', wholeNumber(1), 700)
    .option('--mask-set <file...>', 'mask sets whose commonest mask is scored, too', [])
    .option(...ROUNDS, 7)
    .action(async ({ json, maskSet, ...flags }: BenchFlags & QuantizationFlags) => {
      const { benchQuantization } = await import('../bench/quality-bench.ts');
      const sets = await Promise.all(maskSet.map(readMaskSet));
      const maskSets = [...new Map(sets.map((set) => [maskSetVersion(set), set])).values()];
      const options = { ...flags, home: maskrouteHome(), maskSets };
      await told(json, (hooks) => benchQuantization({ ...options, ...hooks }));
    });
}

function addEdgeBenches(bench: Command): void {
  command(bench, 'route', 'ms of /v1/route at the edge in workerd, with a prompt of 60 tokens')
    .addOption(maskSetOption())
    .option('--requests <count>', 'measured requests', wholeNumber(1), 2000)
    .action(async ({ json, maskSet, requests }: BenchFlags & { maskSet: string; requests: number }) => {
      const { benchRoute } = await import('../bench/route-bench.ts');
      const set = await readMaskSet(maskSet);
      await told(json, (hooks) => benchRoute(set, requests, hooks));
    });

  command(
    bench,
    'edge',
    "latency that the edge adds to its backend, against Portkey's gateway in the same run",
  )
    .addOption(maskSetOption())
    .option('--requests <count>', 'measured requests to each, one at a time', wholeNumber(1), 2000)
    .option('--stream', 'streamed answers, without the gateway', false)
    .action(
      async ({
        json,
        maskSet,
        ...flags
      }: BenchFlags & { maskSet: string; requests: number; stream: boolean }) => {
        const { benchEdge } = await import('../bench/edge-bench.ts');
        const set = await readMaskSet(maskSet);
        await told(json, (hooks) => benchEdge({ ...flags, set, ...hooks }));
      },
    );

  command(
    bench,
    'publish',
    'requests during publications and rollbacks: whether any fails or names a wrong version',
  )
    .option('--requests <count>', 'requests to send', wholeNumber(1), 10_000)
    .option('--changes <count>', 'publications and rollbacks in the meantime', wholeNumber(1), 50)
    .action(async ({ json, ...counts }: BenchFlags & { requests: number; changes: number }) => {
      const { benchPublish } = await import('../bench/publish-bench.ts');
      const set = await readMaskSet(PRESET);
      await told(json, async (hooks) => {
        const result = await benchPublish(set, counts, hooks);
        if (result.failed > 0 || result.wrong > 0) process.exitCode = 1;
        return result;
      });
    });
}

const ARGUMENTS: Readonly<Record<string, string>> = {
  ranks: ' --data chats.jsonl',
  quantization: ' --data chats.jsonl code.jsonl',
  import: ' ./llama-3-8b',
};

const command = (bench: Command, name: string, description: string): Command =>
  bench
    .command(name)
    .description(description)
    .option('--json', 'print the JSON line and nothing else', false)
    .addHelpText('after', examples(`maskroute bench ${name}${ARGUMENTS[name] ?? ''} --json`));

/** The device that `--device` chooses for an installed model. */
async function deviceFor(model: string, flags: DeviceFlags): Promise<Device> {
  const { openInstalled } = await import('../model/store.ts');
  const { manifest } = await openInstalled(maskrouteHome(), model);
  return chosenDevice(flags, manifest);
}

/** The benches for that device. */
async function benchesOn(flags: DeviceFlags, model: string) {
  const device = await deviceFor(model, flags);
  if (device.kind === 'webgpu') {
    const { benchDecodeOn, benchBatchOn } = await import('../bench/device-bench.ts');
    return {
      decode: (options: DecodeOptions) => benchDecodeOn(device, options),
      batch: (options: DecodeOptions) => benchBatchOn(device, options),
    };
  }
  const { benchDecode: decode } = await import('../bench/decode.ts');
  const { benchBatch: batch } = await import('../bench/batch.ts');
  return { decode, batch };
}

/** Measures and prints the result; progress lines only without `--json`. Ctrl-C ends the bench and all that it started. */
const told = (
  json: boolean,
  measure: (hooks: BenchHooks & { readonly signal: AbortSignal }) => Promise<object>,
): Promise<void> =>
  interruptible(async (signal) => {
    const result = await measure({ say: json ? () => undefined : console.log, signal });
    console.log(JSON.stringify(result));
  });

const ranks = (text: string): number[] => [...new Set(text.split(',').map(rank))];
