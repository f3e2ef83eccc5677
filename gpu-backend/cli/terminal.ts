/** What commands share: parsers for arguments and variables, options, Ctrl-C, and running as a backend's job. */
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { InvalidArgumentError, Option } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { waitForLock } from '../files.ts';
import { KV_TYPES, type ModelManifest } from '../model/model-source.ts';
import { chooseDevice, DEVICE_CHOICES, type Device, type DeviceChoice } from '../onnx/device.ts';
import { FLOAT_TYPES, type FloatType } from '../onnx/graph.ts';
import { onStopSignal } from '../stop-signals.ts';
import { createReporter } from './reporter.ts';

export const DATA_HELP =
  'JSONL files whose rows have messages, prompt + completion, question + answer, instruction + output, or text';

/**
 * Runs `work`; Ctrl-C and SIGTERM abort its signal, and so does the end of a parent that started this process with a channel.
 * Prints "Stopped." then, and sets exit code 130.
 */
export async function interruptible(work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const interrupted = new AbortController();
  const stop = () => interrupted.abort();
  const listenNoMore = onStopSignal(stop);
  // Node keeps the process alive for this listener, and no longer.
  process.once('disconnect', stop);
  try {
    await work(interrupted.signal);
  } catch (error) {
    if (!interrupted.signal.aborted) throw error;
    console.error('Stopped.');
    process.exitCode = 130;
  } finally {
    listenNoMore();
    process.removeListener('disconnect', stop);
  }
}

/**
 * Makes this process a backend's job: it kills itself when its parent ends, so that no orphan is left. It waits for an
 * earlier run on the same folder, which may still be ending, and shows that as its progress.
 * @throws MaskrouteError as {@link waitForLock}.
 */
export async function becomeJob(folder: string): Promise<void> {
  const goWithParent = () => process.kill(process.pid, 'SIGKILL');
  // The parent may have ended before this process listened.
  if (process.connected === false) goWithParent();
  process.once('disconnect', goWithParent);
  // The channel alone must not keep the process alive.
  process.channel?.unref();
  const onWait = () => createReporter().update('waiting for the end of an earlier run of this job', 0, 1);
  await waitForLock(join(folder, 'lock'), { onWait });
}

/** The option of commands that can print their result as JSON. */
export const JSON_OPTION = ['--json', 'print JSON and nothing else on standard output', false] as const;

/* Arguments: each function is a parser for commander. */

export function wholeNumber(min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (/^\d+$/.test(text) && value >= min && value <= max) return value;
    const range =
      max < Number.MAX_SAFE_INTEGER ? ` from ${min} to ${max}` : min > 0 ? ` above ${min - 1}` : '';
    throw new InvalidArgumentError(`expected a whole number${range}`);
  };
}

/** The rank of surrogates. */
export function rank(text: string): number {
  const value = wholeNumber(32, 1024)(text);
  if (value % 32 === 0) return value;
  throw new InvalidArgumentError('expected a multiple of 32');
}

/** A finite number for which `isGood` holds. */
export const numberWhere =
  (expected: string, isGood = (_value: number): boolean => true) =>
  (text: string): number => {
    const value = Number(text);
    if (text.trim() !== '' && Number.isFinite(value) && isGood(value)) return value;
    throw new InvalidArgumentError(`expected ${expected}`);
  };

/** A share of a whole, neither 0 nor 1. */
export const part = numberWhere('a number between 0 and 1, such as 0.125', (value) => value > 0 && value < 1);

/** A share of a whole; may be 0. */
export const share = numberWhere(
  'a number of at least 0 and below 1, such as 0.125',
  (value) => value >= 0 && value < 1,
);

/** The values of `--device` and `--float-type`. */
export type DeviceFlags = { readonly device: DeviceChoice; readonly floatType?: FloatType | undefined };

/** `--device`, or MASKROUTE_DEVICE from the environment. */
export const deviceOption = (): Option =>
  new Option('--device <device>', 'where to compute; webgpu: a GPU, auto: a GPU if there is one')
    .choices(DEVICE_CHOICES)
    .env('MASKROUTE_DEVICE')
    .default('cpu');

/** `--float-type`, or MASKROUTE_FLOAT_TYPE from the environment. */
export const floatTypeOption = (): Option =>
  new Option('--float-type <type>', 'the float type on a GPU; by default f16 if the GPU has it')
    .choices(FLOAT_TYPES)
    .env('MASKROUTE_FLOAT_TYPE');

/** `--kv-type`, or MASKROUTE_KV_TYPE from the environment. */
export const kvTypeOption = (): Option =>
  new Option(
    '--kv-type <type>',
    'the type of the KV cache; by default f32, on a GPU its --float-type; f16 takes half the memory of f32',
  )
    .choices(KV_TYPES)
    .env('MASKROUTE_KV_TYPE');

/**
 * The device that the flags choose for a model. When `auto` falls back to the CPU, prints why on standard error.
 * @throws MaskrouteError `no_device`, `invalid_argument`.
 */
export async function chosenDevice(
  { device: choice, floatType }: DeviceFlags,
  { weights }: Pick<ModelManifest, 'weights'>,
): Promise<Device> {
  const { device, reason } = await chooseDevice({ choice, floatType, weights });
  if (reason !== undefined) console.error(`Computing on the CPU: ${reason}.`);
  return device;
}

/** Returns `text` if it is an address. `name`: the flag or variable. @throws MaskrouteError `invalid_argument`. */
export function httpAddress(name: string, text: string): string {
  if (/^https?:$/.test(URL.parse(text)?.protocol ?? '')) return text;
  throw new MaskrouteError('invalid_argument', `${name} must be an http or https address, not "${text}".`);
}

/** A port from the environment, 0 for any free port. @throws MaskrouteError `invalid_argument` when it is no port. */
export function portFrom(name: string, preset: number): number {
  const text = process.env[name];
  if (text === undefined || text === '') return preset;
  const port = Number(text);
  if (/^\d+$/.test(text) && port <= 65_535) return port;
  throw new MaskrouteError('invalid_argument', `${name} must be a port from 0 to 65535, not "${text}".`);
}

/** Of commands for which the variable alone is not enough. */
export const THREADS_OPTION = [
  '--threads <count>',
  'threads that compute (default: MASKROUTE_THREADS, or all cores)',
  wholeNumber(1, 1024),
] as const;

/** `MASKROUTE_THREADS`, by default the number of cores. @throws MaskrouteError `invalid_argument`. */
export function computingThreads(): number {
  const text = process.env.MASKROUTE_THREADS;
  if (text === undefined || text === '') return availableParallelism();
  if (/^[1-9]\d{0,3}$/.test(text)) return Number(text);
  throw new MaskrouteError(
    'invalid_argument',
    `MASKROUTE_THREADS must be a number of threads, not "${text}".`,
  );
}
