/**
 * `bench decode` and `bench batch` with `--device webgpu`: milliseconds a token and tokens a second on a GPU, dense and
 * with a quarter of the blocks skipped.
 *
 * The limit is the device's memory bandwidth: a step reads every weight once. Plain copying on the device is measured in
 * the same run; not on software drivers, which compute on the CPU and have no memory of their own. llama.cpp is not
 * measured, as node-llama-cpp is installed without its GPU builds.
 */
import { denseMask, type Mask, withSurrogates } from '../../shared/mask/mask.ts';
import { inTurns, median, round, times_ms } from '../measure.ts';
import { openInstalled } from '../model/store.ts';
import { weightsRead } from '../model/weights-file.ts';
import { type Device, deviceName } from '../onnx/device.ts';
import { encodeModel } from '../onnx/encode.ts';
import { GraphBuilder } from '../onnx/graph.ts';
import { createSession, tensor } from '../onnx/session.ts';
import { eightMasks, openOurs, streamTokens } from './batch.ts';
import {
  type DecodeOptions,
  decodePositions,
  denseBytes,
  measureDecode,
  openEngine,
  quarterMask,
  type SpeedOptions,
  somePrompt,
  thatFit,
} from './decode.ts';

type Adapter = Device & { readonly kind: 'webgpu' };

export async function benchDecodeOn(device: Adapter, options: DecodeOptions): Promise<object> {
  const { home, model, kvType, rounds, say } = options;
  const at = await decodePositions(options);
  const bandwidth_GBps = await toldBandwidth(device, say);
  const engine = await openEngine(home, model, { device, kvType });
  try {
    const { manifest, dense, runner } = engine;
    const quarter = quarterMask(manifest.config.layerCount);
    const peers = [engine.peer('dense', dense), engine.peer('quarter', quarter)];
    if (runner.surrogates !== undefined)
      peers.push(engine.peer('quarterSurrogates', withSurrogates(quarter, runner.surrogates)));
    const weights = weightsRead(manifest.config, dense);
    const bytes = await denseBytes(engine.folder, manifest.config, device.floatType);
    const positions: Record<string, object> = {};
    for (const [position, found] of await measureDecode(peers, at, options)) {
      const dense_ms = found.get('dense')!;
      positions[`at${position}`] = {
        ...Object.fromEntries([...found].map(([name, ms]) => [`${name}_ms`, round(ms)])),
        speedup25: round(dense_ms / found.get('quarter')!),
        ...shareOf(bytes / dense_ms / 1e6, bandwidth_GBps),
      };
    }
    return {
      bench: 'decode',
      model: manifest.name,
      rounds,
      ...figuresOf(device, bandwidth_GBps),
      ...positions,
      speedup25Limit: round(weights / weightsRead(manifest.config, quarter)),
    };
  } finally {
    await engine.runner.close();
  }
}

const STREAM_TOKENS = 64;

export async function benchBatchOn(
  device: Adapter,
  { home, model, kvType, rounds, say, signal }: DecodeOptions,
): Promise<object> {
  const { folder, manifest } = await openInstalled(home, model);
  thatFit([STREAM_TOKENS], streamTokens, manifest.config, say);
  const bandwidth_GBps = await toldBandwidth(device, say);
  await using ours = await openOurs(home, { model, device, kvType });
  const { layerCount } = ours.config;
  const dense = denseMask(2 * layerCount);
  const masks = eightMasks(layerCount);
  const prompts = masks.map((_, i) => somePrompt(STREAM_TOKENS, ours.config.vocabularySize, i));
  const streams = (count: number, of: readonly Mask[]) => () => ours.streams(prompts.slice(0, count), of);
  const subjects = [
    { name: 'oneStream', tokensPerSecond: streams(1, [dense]) },
    { name: 'eightStreams', tokensPerSecond: streams(masks.length, [dense]) },
    { name: 'eightOneMask', tokensPerSecond: streams(masks.length, [masks[0]!]) },
    { name: 'eightMasks', tokensPerSecond: streams(masks.length, masks) },
  ];
  const found = await inTurns(subjects, rounds, ({ tokensPerSecond }) => tokensPerSecond(), signal);
  const of = (name: string) => round(median(found.get(name)!), 1);
  for (const { name } of subjects) say(`after ${STREAM_TOKENS} tokens, ${name}: ${of(name)} tokens/s`);
  const steps = of('eightStreams') / masks.length;
  const read_GBps = (steps * (await denseBytes(folder, ours.config, device.floatType))) / 1e9;
  return {
    bench: 'batch',
    model: ours.name,
    weights: ours.weights,
    streams: masks.length,
    rounds,
    ...figuresOf(device, bandwidth_GBps),
    ...Object.fromEntries(subjects.map(({ name }) => [`${name}_tokensPerSecond`, of(name)])),
    timesOneStream: round(of('eightStreams') / of('oneStream')),
    masksAgainstOneMask: round(of('eightMasks') / of('eightOneMask')),
    ...shareOf(read_GBps, bandwidth_GBps),
  };
}

const figuresOf = ({ adapter, floatType }: Adapter, bandwidth_GBps: number | null) => ({
  device: 'webgpu',
  adapter,
  floatType,
  llamaCpp: 'not measured',
  bandwidth_GBps: bandwidth_GBps === null ? null : round(bandwidth_GBps, 1),
});

const shareOf = (read_GBps: number, bandwidth_GBps: number | null) => ({
  weightsRead_GBps: round(read_GBps, 1),
  bandwidthShare: bandwidth_GBps === null ? null : round(read_GBps / bandwidth_GBps),
});

async function toldBandwidth(device: Adapter, say: SpeedOptions['say']): Promise<number | null> {
  say(`on ${deviceName(device)}`);
  if (device.isSoftware) {
    say("its drivers compute on the CPU: the memory's bandwidth is not measured");
    return null;
  }
  const found_GBps = await copyBandwidth_GBps();
  say(`plain copying reaches ${found_GBps.toFixed(1)} GB/s, reads and writes together`);
  return found_GBps;
}

const COPIES = 32;
const COPIED_FLOATS = 2 ** 24;

/** Memory bandwidth of the device, reads and writes together: adds 1 to a large buffer again and again. */
async function copyBandwidth_GBps(): Promise<number> {
  const g = new GraphBuilder('copies');
  const one = g.constant('f32', [1], [1]);
  let value = g.op('Expand', [g.input('x', 'f32', [1]), g.ints(COPIED_FLOATS)]);
  for (let i = 0; i < COPIES; i++) value = g.op('Add', [value, one]);
  // Reading one number back waits for all additions.
  const first = g.op('Slice', [value, g.ints(0), g.ints(1)]);
  g.output(first, 'f32', [1]);
  const session = await createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu' });
  const times = await times_ms(6, (turn) =>
    session.run({ x: tensor('f32', Float32Array.of(turn), [1]) }, [first.name]),
  );
  await session.release();
  const bytes = (2 * COPIES + 1) * COPIED_FLOATS * Float32Array.BYTES_PER_ELEMENT;
  // The first run allocates the buffers.
  return bytes / median(times.slice(1)) / 1e6;
}
