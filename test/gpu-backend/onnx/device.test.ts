/** Which device is chosen: real drivers, none at all, and adapters that this machine does not have. */
import { spawnSync } from 'node:child_process';
import { afterEach, expect, test, vi } from 'vitest';
import { chooseDevice, deviceName, type Probe, probeAdapter } from '../../../gpu-backend/onnx/device.ts';
import { testDevice } from '../../support/lavapipe.ts';

afterEach(() => vi.unstubAllEnvs());
const finding = (probe: Probe) => () => Promise.resolve(probe);
const card: Probe = { kind: 'adapter', adapter: 'A Card', isSoftware: false };
const software: Probe = { kind: 'adapter', adapter: 'llvmpipe', isSoftware: true };
const none: Probe = { kind: 'none', reason: 'no driver has an adapter' };

test('the processor is taken without a look at any driver', async () => {
  const probe = vi.fn(finding(card));
  expect(await chooseDevice('cpu', probe)).toEqual({ device: { kind: 'cpu' } });
  expect(probe).not.toHaveBeenCalled();
});

test('auto takes a card, and never drivers that compute on the processor', async () => {
  const { device, reason } = await chooseDevice('auto', finding(card));
  expect(device).toEqual({ kind: 'webgpu', adapter: 'A Card', isSoftware: false });
  expect(deviceName(device)).toBe('A Card, through WebGPU');
  expect(reason).toBeUndefined();
  for (const [probe, why] of [
    [software, 'llvmpipe'],
    [{ ...card, isSoftware: null }, 'may be one of software'],
    [none, 'no driver has an adapter'],
  ] as const) {
    const chosen = await chooseDevice('auto', finding(probe));
    expect(chosen.device).toEqual({ kind: 'cpu' });
    expect(chosen.reason).toContain(why);
  }
});

test('who asks for a GPU gets any adapter, or an error that says what to do', async () => {
  expect((await chooseDevice('webgpu', finding(software))).device.kind).toBe('webgpu');
  await expect(chooseDevice('webgpu', finding(none))).rejects.toMatchObject({
    code: 'no_device',
    message: expect.stringMatching(/no driver has an adapter.*docs\/gpu\.md.*--device cpu/),
  });
});

test('the drivers of this machine are asked in a process of their own', async () => {
  testDevice();
  const found = await probeAdapter();
  expect(found).toMatchObject({ kind: 'adapter' });
  if (process.platform === 'linux')
    expect(found).toMatchObject({ adapter: expect.stringContaining('llvmpipe'), isSoftware: true });
});

test.runIf(process.platform === 'linux')('without a driver there is no adapter', async () => {
  vi.stubEnv('VK_DRIVER_FILES', '/nowhere/icd.json');
  expect(await probeAdapter()).toEqual({ kind: 'none', reason: expect.stringContaining('adapter') });
});

test.runIf(process.platform === 'linux').each([
  ['--device', ['--device', 'webgpu'], {}],
  ['MASKROUTE_DEVICE', [], { MASKROUTE_DEVICE: 'webgpu' }],
])('a command that is told of a device by %s says that there is none', (_, flags, environment) => {
  const { status, stderr } = spawnSync(process.execPath, ['bin/maskroute.js', 'bench', 'decode', ...flags], {
    env: { ...process.env, ...environment, VK_DRIVER_FILES: '/nowhere/icd.json' },
    encoding: 'utf8',
  });
  expect(status).toBe(1);
  expect(stderr).toContain('There is no GPU that ONNX Runtime can use');
});
