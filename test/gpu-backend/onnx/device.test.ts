/** Which device is chosen: real drivers, none at all, and adapters that this machine does not have. */
import { spawnSync } from 'node:child_process';
import { afterEach, expect, test, vi } from 'vitest';
import type { WeightKind } from '../../../gpu-backend/model/model-source.ts';
import {
  chooseDevice,
  type DeviceChoice,
  deviceName,
  type Probe,
  probeAdapter,
} from '../../../gpu-backend/onnx/device.ts';
import type { FloatType } from '../../../gpu-backend/onnx/graph.ts';
import { testDevice } from '../../support/lavapipe.ts';
import { tinyHome } from '../learning/evaluation/tiny.ts';

afterEach(() => vi.unstubAllEnvs());
const finding = (probe: Probe) => () => Promise.resolve(probe);
const card: Probe = { kind: 'adapter', adapter: 'A Card', isSoftware: false, hasHalves: true };
const software: Probe = { kind: 'adapter', adapter: 'llvmpipe', isSoftware: true, hasHalves: true };
const none: Probe = { kind: 'none', reason: 'no driver has an adapter' };
const wish = (choice: DeviceChoice, floatType?: FloatType, weights: WeightKind = 'q8') => ({
  choice,
  floatType,
  weights,
});

test('the CPU is taken without a look at any driver', async () => {
  const probe = vi.fn(finding(card));
  expect(await chooseDevice(wish('cpu'), probe)).toEqual({ device: { kind: 'cpu' } });
  expect(probe).not.toHaveBeenCalled();
});

test('auto takes a card, and never drivers that compute on the CPU', async () => {
  const { device, reason } = await chooseDevice(wish('auto'), finding(card));
  expect(device).toEqual({ kind: 'webgpu', adapter: 'A Card', isSoftware: false, floatType: 'f16' });
  expect(deviceName(device)).toBe('A Card, through WebGPU in f16');
  expect(reason).toBeUndefined();
  for (const [probe, why] of [
    [software, 'llvmpipe'],
    [{ ...card, isSoftware: null }, 'may be a software adapter'],
    [none, 'no driver has an adapter'],
  ] as const) {
    const chosen = await chooseDevice(wish('auto'), finding(probe));
    expect(chosen.device).toEqual({ kind: 'cpu' });
    expect(chosen.reason).toContain(why);
    expect(chosen.reason).not.toContain('f16');
    const wished = await chooseDevice(wish('auto', 'f16'), finding(probe));
    expect(wished).toEqual({ device: { kind: 'cpu' }, reason: expect.stringMatching(/f32, not in f16/) });
  }
});

test('who asks for a GPU gets any adapter, or an error that says what to do', async () => {
  expect((await chooseDevice(wish('webgpu'), finding(software))).device.kind).toBe('webgpu');
  await expect(chooseDevice(wish('webgpu'), finding(none))).rejects.toMatchObject({
    code: 'no_device',
    message: expect.stringMatching(/no driver has an adapter.*docs\/gpu\.md.*--device cpu/),
  });
});

test('a GPU computes in fp16 where it can, and in what it is told; who asks for more than it has is told', async () => {
  const floatType = async (wished: FloatType | undefined, hasHalves: boolean) => {
    const { device } = await chooseDevice(wish('webgpu', wished), finding({ ...card, hasHalves }));
    return device.kind === 'webgpu' && device.floatType;
  };
  expect(await floatType(undefined, true)).toBe('f16');
  expect(await floatType(undefined, false)).toBe('f32');
  expect(await floatType('f32', true)).toBe('f32');
  await expect(floatType('f16', false)).rejects.toThrow(/A Card does not compute in f16.*--float-type f32/);
  await expect(chooseDevice(wish('cpu', 'f16'))).rejects.toThrow(/CPU computes in f32/);
});

test('weights by column stay on the CPU: auto says why and asks no driver, and a GPU is refused with what to take instead', async () => {
  const probe = vi.fn(finding(card));
  expect(await chooseDevice(wish('auto', undefined, 'q8-columns'), probe)).toEqual({
    device: { kind: 'cpu' },
    reason: "the model's weights are held by column, which only a CPU multiplies",
  });
  await expect(chooseDevice(wish('webgpu', undefined, 'q8-columns'), probe)).rejects.toMatchObject({
    code: 'invalid_argument',
    message: expect.stringMatching(/held by column.*--device cpu, or .* --weights q8 for a GPU/),
  });
  expect(probe).not.toHaveBeenCalled();
});

test('the drivers of this machine are asked in a process of their own', async () => {
  testDevice();
  const found = await probeAdapter();
  expect(found).toMatchObject({ kind: 'adapter' });
  if (process.platform === 'linux')
    expect(found).toMatchObject({ adapter: expect.stringContaining('llvmpipe'), isSoftware: true });
});

// Mesa's name for a CPU of before 2011, which has no instructions for halves.
test.runIf(process.platform === 'linux' && process.arch === 'x64').each([
  ['', true],
  ['sse4.1', false],
])('what a driver computes in is found out: with CPU features "%s"', async (features, hasHalves) => {
  testDevice();
  if (features !== '') vi.stubEnv('GALLIUM_OVERRIDE_CPU_CAPS', features);
  expect(await probeAdapter()).toMatchObject({ kind: 'adapter', hasHalves });
});

test.runIf(process.platform === 'linux')('without a driver there is no adapter', async () => {
  vi.stubEnv('VK_DRIVER_FILES', '/nowhere/icd.json');
  expect(await probeAdapter()).toEqual({ kind: 'none', reason: expect.stringContaining('adapter') });
});

test.runIf(process.platform === 'linux').each([
  ['--device', ['--device', 'webgpu'], {}],
  ['MASKROUTE_DEVICE', [], { MASKROUTE_DEVICE: 'webgpu' }],
])('a command that is told of a device by %s says that there is none', async (_, flags, environment) => {
  using tiny = await tinyHome();
  const command = ['bin/maskroute.js', 'bench', 'decode', '--model', 'tiny', ...flags];
  const { status, stderr } = spawnSync(process.execPath, command, {
    env: {
      ...process.env,
      ...environment,
      MASKROUTE_HOME: tiny.home,
      VK_DRIVER_FILES: '/nowhere/icd.json',
    },
    encoding: 'utf8',
  });
  expect(status).toBe(1);
  expect(stderr).toContain('There is no GPU that ONNX Runtime can use');
});
