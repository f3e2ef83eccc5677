/**
 * Probes the GPU, in a child process (`device.ts`): the package `webgpu` says the adapter's name, and a small ONNX Runtime
 * session shows whether it computes.
 */

import { encodeModel } from './encode.ts';
import type { FloatType } from './graph.ts';
import { GraphBuilder } from './graph.ts';
import { createSession, floatsOrHalves, floatTensor } from './session.ts';

/** The result, which the parent process parses. */
type Probe =
  | {
      readonly kind: 'adapter';
      readonly adapter: string;
      readonly isSoftware: boolean | null;
      readonly hasHalves: boolean;
    }
  | { readonly kind: 'none'; readonly reason: string };

async function probe(): Promise<Probe> {
  const named = await askName();
  if (named?.kind === 'none') return named;
  try {
    await compute('f32');
  } catch (error) {
    return { kind: 'none', reason: lastSentence((error as Error).message) };
  }
  // ONNX Runtime requests fp16 itself; whether it got it shows only when fp16 runs.
  const hasHalves = await compute('f16').then(
    () => true,
    () => false,
  );
  return {
    ...(named ?? { adapter: 'an adapter without a name', isSoftware: null }),
    kind: 'adapter',
    hasHalves,
  };
}

type Named = { readonly kind: 'named'; readonly adapter: string; readonly isSoftware: boolean };

/** `undefined` without the package, which is optional. */
async function askName(): Promise<Named | (Probe & { readonly kind: 'none' }) | undefined> {
  const webgpu = await import('webgpu').catch(() => undefined);
  if (webgpu === undefined) return undefined;
  const adapter = await webgpu.create([]).requestAdapter({ powerPreference: 'high-performance' });
  if (adapter === null)
    return { kind: 'none', reason: 'no driver for Vulkan, Metal or Direct3D has an adapter' };
  const { vendor, device, description, isFallbackAdapter } = adapter.info;
  return {
    kind: 'named',
    adapter: description || [vendor, device].filter(Boolean).join(' '),
    isSoftware: isFallbackAdapter,
  };
}

async function compute(type: FloatType): Promise<void> {
  const g = new GraphBuilder('probe');
  const x = g.input('x', type, [2]);
  const sum = g.op('Add', [x, x]);
  g.output(sum, type, [2]);
  const session = await createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu' });
  const outputs = await session.run({ x: floatTensor(type, [1, 2], [2]) }, [sum.name]);
  const [two, four] = floatsOrHalves(outputs[sum.name]!);
  if (two !== 2 || four !== 4) throw new Error('it adds wrongly');
}

/** An ONNX Runtime message without the source position at its beginning. */
const lastSentence = (message: string): string =>
  message.trim().split('was false. ').at(-1)!.replace(/\.$/, '');

const found = await probe();
// The native libraries may crash at exit, so the result is written first.
process.stdout.write(`${JSON.stringify(found)}\n`, () => process.exit(0));
