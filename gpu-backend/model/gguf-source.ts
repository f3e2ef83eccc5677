/** A GGUF file as a `WeightSource`: header checked, weights read from the disk when asked for. */
import { openRegular } from '../regular-file.ts';
import { tensorType } from './dequantize.ts';
import type { GgufHeader } from './gguf-header.ts';
import { readGgufHeader } from './gguf-header.ts';
import { configFromGguf } from './llama-config.ts';
import { checkLlamaTensors, llamaTensors, toHalfSplitRotary } from './llama-tensors.ts';
import type { OpenModelFile } from './open-model.ts';
import { readTensor } from './weight-reader.ts';

export type GgufFile = OpenModelFile & { readonly metadata: GgufHeader['metadata'] };

/** @throws MaskrouteError `corrupt_model`, `unsupported_model`; what `openRegular` throws. */
export async function openGguf(path: string): Promise<GgufFile> {
  const file = await openRegular(path);
  try {
    const header = readGgufHeader(file.fd, (await file.stat()).size);
    const config = configFromGguf(header);
    const tensors = new Map(llamaTensors(config).map((tensor) => [tensor.name, tensor]));
    const shapes = new Map([...header.tensors.values()].map(({ name, shape }) => [name, shape]));
    checkLlamaTensors([...tensors.values()], shapes, (tensor) => tensor.ggufName);

    const find = (name: string) => {
      const tensor = tensors.get(name);
      if (tensor === undefined) throw new RangeError(`the model has no tensor ${name}`);
      return tensor;
    };
    return {
      config,
      metadata: header.metadata,
      weightFiles: [path],
      has: (name) => tensors.has(name),
      shape: (name) => find(name).shape,
      async read(name) {
        const tensor = find(name);
        const stored = header.tensors.get(tensor.ggufName)!;
        const elements = tensor.shape.reduce((product, size) => product * size, 1);
        const values = await readTensor(file, name, tensorType(stored.type)!, stored.offset, elements);
        if (tensor.rotaryHeads === undefined) return values;
        return toHalfSplitRotary(values, tensor.rotaryHeads, tensor.shape[1]!);
      },
      close: () => file.close(),
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}
