/** The GPU of the tests: Mesa's lavapipe on Linux, what the machine has elsewhere. */
import type { Device } from '../../gpu-backend/onnx/device.ts';
import type { FloatType } from '../../gpu-backend/onnx/graph.ts';
import { useLavapipe } from '../../scripts/test-tools.ts';

/** To be called before anything opens a device. @throws Error where lavapipe is missing. */
export function testDevice(floatType: FloatType = 'f32'): Device & { readonly kind: 'webgpu' } {
  if (process.platform === 'linux') useLavapipe();
  return { kind: 'webgpu', adapter: 'of the tests', isSoftware: true, floatType };
}
