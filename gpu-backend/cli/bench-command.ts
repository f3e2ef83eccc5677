/** `bench …`: speed, measured. The last line of each is one JSON object; with `--json` it is the only one. */
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Command, InvalidArgumentError } from 'commander';
import { maskrouteHome } from '../files.ts';
import { DEFAULT_MODEL } from '../model/sources/default-model.ts';
import { readMaskSet } from '../publication/artefact-files.ts';
import { DATA_HELP, interruptible, wholeNumber } from './terminal.ts';

const PRESET = path.join(
  fileURLToPath(new URL('../presets', import.meta.url)),
  DEFAULT_MODEL,
  'mask-set.json',
);

type BenchFlags = { readonly json: boolean };

export function addBenchCommands(program: Command): void {
  const bench = program.command('bench').description('measure speed; the last line is one JSON object');

  for (const [name, what] of [
    ['decode', 'milliseconds a token, dense and masked, against llama.cpp'],
    ['prefill', 'milliseconds for a prompt of 512 tokens, against llama.cpp'],
  ] as const) {
    bench
      .command(name)
      .description(what)
      .option('--rounds <count>', 'interleaved rounds whose median counts', positiveInteger, 7)
      .option('--json', 'nothing but the JSON line', false)
      .action(async (flags: BenchFlags & { rounds: number }) => {
        const { benchDecode, benchPrefill } = await import('../bench/decode.ts');
        const say = flags.json ? () => undefined : console.log;
        const options = { home: maskrouteHome(), rounds: flags.rounds, say };
        const result = await (name === 'decode' ? benchDecode(options) : benchPrefill(options));
        console.log(JSON.stringify(result));
      });
  }

  bench
    .command('encode')
    .description('what embedding takes with the static encoder, tokenization included')
    .option('--json', 'nothing but the JSON line', false)
    .action(async ({ json }: BenchFlags) => {
      const { benchEncode } = await import('../bench/route-bench.ts');
      console.log(JSON.stringify(await benchEncode(json ? () => undefined : console.log)));
    });

  bench
    .command('learn')
    .description('milliseconds of a training step of the gates, against PyTorch where Python has it')
    .option('--rounds <count>', 'interleaved rounds whose median counts', positiveInteger, 5)
    .option('--json', 'nothing but the JSON line', false)
    .action(async (flags: BenchFlags & { rounds: number }) => {
      const { benchLearn } = await import('../bench/learn-bench.ts');
      const say = flags.json ? () => undefined : console.log;
      console.log(JSON.stringify(await benchLearn({ home: maskrouteHome(), rounds: flags.rounds, say })));
    });

  bench
    .command('ranks')
    .description('what a rank of surrogates gives in KL and takes in time; some minutes a rank')
    .requiredOption('--data <file...>', DATA_HELP)
    .option('--ranks <numbers>', 'multiples of 32', ranks, [32, 64, 128, 256])
    .option('--rounds <count>', 'interleaved rounds whose median counts', positiveInteger, 7)
    .option('--json', 'nothing but the JSON line', false)
    .action(({ json, ...flags }: BenchFlags & { data: string[]; ranks: number[]; rounds: number }) =>
      interruptible(async (signal) => {
        const { benchRanks } = await import('../bench/ranks.ts');
        const say = json ? () => undefined : console.log;
        const options = { ...flags, home: maskrouteHome(), threads: availableParallelism(), say, signal };
        console.log(JSON.stringify(await benchRanks(options)));
      }),
    );

  bench
    .command('route')
    .description('what /v1/route takes at the edge in workerd, with a prompt of 60 tokens')
    .option('--mask-set <file>', 'the set to route by (default: the preset)', PRESET)
    .option('--requests <count>', 'how many are measured', positiveInteger, 2000)
    .option('--json', 'nothing but the JSON line', false)
    .action(async (flags: BenchFlags & { maskSet: string; requests: number }) => {
      const { benchRoute } = await import('../bench/route-bench.ts');
      const say = flags.json ? () => undefined : console.log;
      const result = await benchRoute(await readMaskSet(flags.maskSet), flags.requests, say);
      console.log(JSON.stringify(result));
    });

  bench
    .command('edge')
    .description(
      "what the edge adds to calling a backend directly, against Portkey's gateway in the same run",
    )
    .option('--mask-set <file>', 'the set to route by (default: the preset)', PRESET)
    .option('--requests <count>', 'how many of each are measured, one at a time', positiveInteger, 2000)
    .option('--stream', 'streamed answers, without the peer', false)
    .option('--json', 'nothing but the JSON line', false)
    .action(async (flags: BenchFlags & { maskSet: string; requests: number; stream: boolean }) => {
      const { benchEdge } = await import('../bench/edge-bench.ts');
      const say = flags.json ? () => undefined : console.log;
      const { requests, stream } = flags;
      const set = await readMaskSet(flags.maskSet);
      console.log(JSON.stringify(await benchEdge({ set, requests, stream, say })));
    });

  bench
    .command('publish')
    .description(
      'requests during publications and rollbacks: which versions they name, and whether any fails',
    )
    .option('--requests <count>', 'how many are sent', positiveInteger, 10_000)
    .option('--changes <count>', 'publications and rollbacks meanwhile', positiveInteger, 50)
    .option('--json', 'nothing but the JSON line', false)
    .action(async (flags: BenchFlags & { requests: number; changes: number }) => {
      const { benchPublish } = await import('../bench/publish-bench.ts');
      const say = flags.json ? () => undefined : console.log;
      const result = await benchPublish(await readMaskSet(PRESET), flags, say);
      console.log(JSON.stringify(result));
      if (result.failed > 0 || result.wrong > 0) process.exitCode = 1;
    });
}

const ranks = (text: string): number[] => text.split(',').map(wholeNumber(32, 1024));

function positiveInteger(text: string): number {
  const value = Number(text);
  if (Number.isSafeInteger(value) && value > 0) return value;
  throw new InvalidArgumentError('expected a whole number above 0');
}
