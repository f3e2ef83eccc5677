/**
 * Chooses the device: the CPU, or a GPU through ONNX Runtime's WebGPU provider (Vulkan, Metal, Direct3D). A broken driver can
 * crash the process that loads it, so a child process probes it first (`adapter-probe.ts`).
 */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { WeightKind } from '../model/model-source.ts';
import type { FloatType } from './graph.ts';

export const DEVICE_CHOICES = ['cpu', 'webgpu', 'auto'] as const;
export type DeviceChoice = (typeof DEVICE_CHOICES)[number];

/** Plain data, as it is sent to the engine's thread. */
export type Device =
  | { readonly kind: 'cpu' }
  | {
      readonly kind: 'webgpu';
      /** The adapter's name. */
      readonly adapter: string;
      /** Whether the driver computes on the CPU: correct, but slow. */
      readonly isSoftware: boolean;
      readonly floatType: FloatType;
    };

export const CPU: Device = { kind: 'cpu' };

export const deviceName = (device: Device): string =>
  device.kind === 'cpu' ? 'the CPU' : `${device.adapter}, through WebGPU in ${device.floatType}`;

/** The child process' result, a line of JSON. `isSoftware`: null when unknown. `hasHalves`: whether it computes in fp16. */
const probeSchema = z.discriminatedUnion('kind', [
  z.object({
    kind: z.literal('adapter'),
    adapter: z.string(),
    isSoftware: z.boolean().nullable(),
    hasHalves: z.boolean(),
  }),
  z.object({ kind: z.literal('none'), reason: z.string() }),
]);
export type Probe = z.infer<typeof probeSchema>;

type ChosenDevice = {
  readonly device: Device;
  /** With `auto`: why the CPU was chosen. The caller prints it once. */
  readonly reason?: string;
};

type DeviceWish = {
  readonly choice: DeviceChoice;
  readonly floatType?: FloatType | undefined;
  /** The kind of the model's weights. */
  readonly weights: WeightKind;
};

/**
 * Chooses the device for a model. A GPU computes in fp16 if it can, unless `floatType` says otherwise.
 * @throws MaskrouteError `no_device` for `webgpu` without an adapter that ONNX Runtime can use, `invalid_argument` for a
 * type that the device does not support, or weights that a GPU does not.
 */
export async function chooseDevice(
  { choice, floatType, weights }: DeviceWish,
  probe = probeAdapter,
): Promise<ChosenDevice> {
  if (choice === 'cpu') {
    if (floatType === 'f16')
      throw new MaskrouteError('invalid_argument', 'The CPU computes in f32: take no --float-type f16.');
    return { device: CPU };
  }
  if (weights === 'q8-columns') {
    if (choice === 'auto') return insteadOfGpu(BY_COLUMN, floatType);
    const message = `A GPU cannot compute this model: ${BY_COLUMN}. Take --device cpu, or pull the model with --weights q8 for a GPU.`;
    throw new MaskrouteError('invalid_argument', message);
  }
  const found = await probe();
  switch (found.kind) {
    case 'none':
      if (choice === 'auto') return insteadOfGpu(found.reason, floatType);
      throw new MaskrouteError(
        'no_device',
        `There is no GPU that ONNX Runtime can use: ${found.reason}. See docs/gpu.md for what to install, or take --device cpu.`,
      );
    case 'adapter': {
      const { adapter, isSoftware, hasHalves } = found;
      if (choice === 'auto' && isSoftware !== false) {
        const what = isSoftware ? 'is a software adapter' : 'may be a software adapter';
        return insteadOfGpu(`the only adapter, ${adapter}, ${what}`, floatType);
      }
      if (floatType === 'f16' && !hasHalves)
        throw new MaskrouteError(
          'invalid_argument',
          `${adapter} does not compute in f16 (it lacks shader-f16): take --float-type f32.`,
        );
      const best = hasHalves ? 'f16' : 'f32';
      return {
        device: { kind: 'webgpu', adapter, isSoftware: isSoftware ?? false, floatType: floatType ?? best },
      };
    }
  }
}

const BY_COLUMN = "the model's weights are held by column, which only a CPU multiplies";

/** The CPU, and why `auto` chose it. Says, too, when that gives up a type that only a GPU computes in. */
const insteadOfGpu = (reason: string, floatType: FloatType | undefined): ChosenDevice => ({
  device: CPU,
  reason:
    floatType === 'f16' ? `${reason}; the CPU computes in f32, not in f16 as --float-type says` : reason,
});

const PROBE_MAX_ms = 60_000;

/** Finds the adapter that ONNX Runtime would use on this machine. */
export function probeAdapter(): Promise<Probe> {
  const file = fileURLToPath(new URL('./adapter-probe.ts', import.meta.url));
  return new Promise((resolve) => {
    execFile(
      process.execPath,
      [file],
      { timeout: PROBE_MAX_ms, env: { ...process.env, NODE_OPTIONS: '' } },
      (error, stdout) => {
        const said = stdout.trimEnd().split('\n').at(-1) ?? '';
        resolve(parsed(said) ?? { kind: 'none', reason: endOf(error) });
      },
    );
  });
}

function parsed(line: string): Probe | undefined {
  try {
    return probeSchema.safeParse(JSON.parse(line)).data;
  } catch {
    return undefined;
  }
}

function endOf(error: (Error & { signal?: string | null; killed?: boolean; code?: unknown }) | null): string {
  if (error?.killed) return `its drivers did not answer within ${PROBE_MAX_ms / 1000} s`;
  return `the process that asked its drivers ended with ${error?.signal ?? `code ${error?.code ?? 0}`}`;
}
