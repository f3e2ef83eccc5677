/** `bench …`: speed, measured. The last line of each is one JSON object; with `--json` it is the only one. */
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import { type Command, Option } from 'commander';
import { maskrouteHome } from '../files.ts';
import { WEIGHT_KINDS, type WeightKind } from '../model/model-source.ts';
import { DEFAULT_MODEL } from '../model/sources/default-model.ts';
import type { DeviceChoice } from '../onnx/device.ts';
import { readMaskSet } from '../publication/artefact-files.ts';
import {
  chosenDevice,
  DATA_HELP,
  deviceOption,
  examples,
  interruptible,
  rank,
  wholeNumber,
} from './terminal.ts';

const PRESET = fileURLToPath(new URL(`../presets/${DEFAULT_MODEL}/mask-set.json`, import.meta.url));
const ROUNDS = ['--rounds <count>', 'interleaved rounds whose median counts', wholeNumber(1)] as const;
const LONG = ['--long', 'contexts of 2,048, 4,096 and 8,000 tokens; some minutes a round', false] as const;
const MASK_SET = ['--mask-set <file>', 'the set to route by (default: the preset)', PRESET] as const;

type BenchFlags = { readonly json: boolean };
type OnDevice = BenchFlags & { readonly device: DeviceChoice };
type MasksFlags = { model: string; steps: number; prefill: boolean; layers?: number; rounds: number };
type QuantizationFlags = { data: string[]; positions: number; maskSet: string[]; rounds: number };

export function addBenchCommands(program: Command): void {
  const bench = program
    .command('bench')
    .description('measure speed; the last line is one JSON object')
    .addHelpText('after', examples('maskroute bench decode', 'maskroute bench edge --stream --json'));

  command(bench, 'decode', 'milliseconds a token, dense and masked, against llama.cpp')
    .option(...ROUNDS, 7)
    .option(...LONG)
    .addOption(deviceOption())
    .action(async ({ json, device: choice, ...flags }: OnDevice & { rounds: number; long: boolean }) => {
      const device = await chosenDevice(choice);
      const options = { home: maskrouteHome(), ...flags };
      if (device.kind === 'webgpu') {
        const { benchDecodeOn } = await import('../bench/device-bench.ts');
        await told(json, (say) => benchDecodeOn(device, { ...options, say }));
      } else {
        const { benchDecode } = await import('../bench/decode.ts');
        await told(json, (say) => benchDecode({ ...options, say }));
      }
    });

  command(bench, 'prefill', 'milliseconds for a prompt of 512 tokens, against llama.cpp')
    .option(...ROUNDS, 7)
    .option(...LONG)
    .action(async ({ json, ...flags }: BenchFlags & { rounds: number; long: boolean }) => {
      const { benchPrefill } = await import('../bench/decode.ts');
      await told(json, (say) => benchPrefill({ home: maskrouteHome(), ...flags, say }));
    });

  command(
    bench,
    'masks',
    'what leaving blocks out is worth, by kind, decoding and reading prompts; its memory',
  )
    .option('--model <name>', 'an installed model', DEFAULT_MODEL)
    .option('--steps <count>', 'decoded tokens of a figure', wholeNumber(1), 8)
    .option('--no-prefill', 'decoding alone')
    .option(
      '--layers <count>',
      'tell the figures for so many layers like those that are installed',
      wholeNumber(1),
    )
    .option(...ROUNDS, 3)
    .action(async ({ json, ...flags }: BenchFlags & MasksFlags) => {
      const { benchMasks } = await import('../bench/masks-bench.ts');
      await told(json, (say) => benchMasks({ home: maskrouteHome(), ...flags, say }));
    });

  command(
    bench,
    'batch',
    'tokens a second of eight streams, under one mask and under eight, against llama.cpp',
  )
    .option(...ROUNDS, 3)
    .addOption(deviceOption())
    .action(async ({ json, device: choice, rounds }: OnDevice & { rounds: number }) => {
      const device = await chosenDevice(choice);
      const options = { home: maskrouteHome(), rounds };
      if (device.kind === 'webgpu') {
        const { benchBatchOn } = await import('../bench/device-bench.ts');
        await told(json, (say) => benchBatchOn(device, { ...options, say }));
      } else {
        const { benchBatch } = await import('../bench/batch.ts');
        await told(json, (say) => benchBatch({ ...options, say }));
      }
    });

  command(bench, 'prefix', 'milliseconds to the first token, when 400 tokens of the prompt are known')
    .option(...ROUNDS, 7)
    .action(async ({ json, rounds }: BenchFlags & { rounds: number }) => {
      const { benchPrefix } = await import('../bench/batch.ts');
      await told(json, (say) => benchPrefix({ home: maskrouteHome(), rounds, say }));
    });

  command(
    bench,
    'import',
    'seconds and memory that taking a model in takes, beside what disk and processors allow',
  )
    .argument('<spec>', 'a file or folder')
    .addOption(new Option('--weights <kind>', 'how weights are held').choices(WEIGHT_KINDS).default('q8'))
    .option('--home <folder>', 'where the model is installed and stays; else it is removed afterwards')
    .action(async (spec: string, { json, ...flags }: BenchFlags & { weights: WeightKind; home?: string }) => {
      const { benchImport } = await import('../bench/import-bench.ts');
      const { home, weights } = flags;
      await told(json, (say) => benchImport({ spec, weights, home, say }));
    });

  command(bench, 'encode', 'what embedding takes, tokenization included')
    .option('--encoder <name>', 'a full encoder, in short texts a second; else the static one')
    .action(async ({ json, encoder }: BenchFlags & { encoder?: string }) => {
      const { benchEncode, benchFullEncoder } = await import('../bench/route-bench.ts');
      if (encoder === undefined) await told(json, benchEncode);
      else await told(json, (say) => benchFullEncoder(encoder, maskrouteHome(), say));
    });

  command(bench, 'learn', 'milliseconds of a training step of the gates, against PyTorch where Python has it')
    .option(...ROUNDS, 5)
    .action(async ({ json, rounds }: BenchFlags & { rounds: number }) => {
      const { benchLearn } = await import('../bench/learn-bench.ts');
      await told(json, (say) => benchLearn({ home: maskrouteHome(), rounds, say }));
    });

  command(
    bench,
    'learn-many',
    'a learning run on two workers with a thread each, against one; needs valkey-server, and some minutes',
  ).action(async ({ json }: BenchFlags) => {
    const { benchLearnMany } = await import('../bench/learn-many.ts');
    await told(json, (say) => benchLearnMany({ home: maskrouteHome(), say }));
  });

  command(bench, 'ranks', 'what a rank of surrogates gives in KL and takes in time; some minutes a rank')
    .requiredOption('--data <file...>', DATA_HELP)
    .option('--ranks <numbers>', 'multiples of 32', ranks, [32, 64, 128, 256])
    .option(...ROUNDS, 7)
    .action(({ json, ...flags }: BenchFlags & { data: string[]; ranks: number[]; rounds: number }) =>
      interruptible(async (signal) => {
        const { benchRanks } = await import('../bench/ranks.ts');
        const options = { ...flags, home: maskrouteHome(), threads: availableParallelism(), signal };
        await told(json, (say) => benchRanks({ ...options, say }));
      }),
    );

  command(
    bench,
    'quantization',
    'what four and eight bits cost and give beside fp32, dense and masked; needs the three models installed',
  )
    .requiredOption('--data <file...>', `${DATA_HELP}; a file is a kind of text`)
    .option('--positions <count>', 'scored of each kind', wholeNumber(1), 700)
    .option('--mask-set <file...>', 'sets whose commonest mask is judged, too', [])
    .option(...ROUNDS, 7)
    .action(({ json, maskSet, ...flags }: BenchFlags & QuantizationFlags) =>
      interruptible(async (signal) => {
        const { benchQuantization } = await import('../bench/quantization.ts');
        const maskSets = await Promise.all(maskSet.map(readMaskSet));
        const options = { ...flags, home: maskrouteHome(), maskSets, signal };
        await told(json, (say) => benchQuantization({ ...options, say }));
      }),
    );

  command(bench, 'route', 'what /v1/route takes at the edge in workerd, with a prompt of 60 tokens')
    .option(...MASK_SET)
    .option('--requests <count>', 'how many are measured', wholeNumber(1), 2000)
    .action(async ({ json, maskSet, requests }: BenchFlags & { maskSet: string; requests: number }) => {
      const { benchRoute } = await import('../bench/route-bench.ts');
      const set = await readMaskSet(maskSet);
      await told(json, (say) => benchRoute(set, requests, say));
    });

  command(
    bench,
    'edge',
    "what the edge adds to calling a backend directly, against Portkey's gateway in the same run",
  )
    .option(...MASK_SET)
    .option('--requests <count>', 'how many of each are measured, one at a time', wholeNumber(1), 2000)
    .option('--stream', 'streamed answers, without the peer', false)
    .action(
      async ({
        json,
        maskSet,
        ...flags
      }: BenchFlags & { maskSet: string; requests: number; stream: boolean }) => {
        const { benchEdge } = await import('../bench/edge-bench.ts');
        const set = await readMaskSet(maskSet);
        await told(json, (say) => benchEdge({ ...flags, set, say }));
      },
    );

  command(
    bench,
    'publish',
    'requests during publications and rollbacks: which versions they name, and whether any fails',
  )
    .option('--requests <count>', 'how many are sent', wholeNumber(1), 10_000)
    .option('--changes <count>', 'publications and rollbacks meanwhile', wholeNumber(1), 50)
    .action(async ({ json, ...counts }: BenchFlags & { requests: number; changes: number }) => {
      const { benchPublish } = await import('../bench/publish-bench.ts');
      const set = await readMaskSet(PRESET);
      const { failed, wrong } = await told(json, (say) => benchPublish(set, counts, say));
      if (failed > 0 || wrong > 0) process.exitCode = 1;
    });
}

const ARGUMENTS: Readonly<Record<string, string>> = { ranks: ' --data chats.jsonl', import: ' ./llama-3-8b' };

const command = (bench: Command, name: string, description: string): Command =>
  bench
    .command(name)
    .description(description)
    .option('--json', 'nothing but the JSON line', false)
    .addHelpText('after', examples(`maskroute bench ${name}${ARGUMENTS[name] ?? ''} --json`));

/** Measures, and prints what was found; what is said meanwhile is for people. */
async function told<T extends object>(
  json: boolean,
  measure: (say: (line: string) => void) => Promise<T>,
): Promise<T> {
  const result = await measure(json ? () => undefined : console.log);
  console.log(JSON.stringify(result));
  return result;
}

const ranks = (text: string): number[] => text.split(',').map(rank);
