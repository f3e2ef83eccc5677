/**
 * What a file or folder on this machine holds: which of it makes a model, and what is refused before anything reads it.
 * Pickles are never read, since reading one runs code of whoever wrote it.
 */
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { openRegular } from '../../files.ts';
import type { LocalModel } from '../import-model.ts';
import { quoted, unsupportedModel } from '../model-source.ts';

/** @throws MaskrouteError `unsupported_model`, `invalid_request`; what `openRegular` throws. */
export async function modelInFile(file: string): Promise<LocalModel> {
  const name = path.basename(file);
  if (/\.safetensors$/i.test(name)) {
    throw new MaskrouteError(
      'invalid_request',
      `${name} holds weights alone: give the folder with it, its config.json and its tokenizer.json.`,
    );
  }
  if (await isPickle(file)) throw pickle(name);
  return { kind: 'gguf', path: file, source: `file:${name}` };
}

/**
 * A folder with config.json and weights, or with one GGUF model, whole or in parts.
 * @throws MaskrouteError `unsupported_model`, `invalid_request` where there are several.
 */
export async function modelInFolder(folder: string, source: string): Promise<LocalModel> {
  const names = (await readdir(folder)).sort();
  if (names.some((name) => /\.safetensors(\.index\.json)?$/.test(name))) {
    return { kind: 'folder', path: folder, source };
  }
  const models = ggufModels(names);
  if (models.length > 1) {
    throw new MaskrouteError(
      'invalid_request',
      `The folder has ${models.length} models (${models.slice(0, 5).join(', ')}): name one of them.`,
    );
  }
  const [gguf] = models;
  if (gguf !== undefined) return { kind: 'gguf', path: path.join(folder, gguf), source: `${source}/${gguf}` };
  refusePickles(names);
  return { kind: 'folder', path: folder, source };
}

/** GGUF files by name, of those in parts the first; projectors of images belong to a model and are none. */
export const ggufModels = (names: readonly string[]): string[] =>
  names.filter(
    (name) =>
      /\.gguf$/i.test(name) &&
      !/^mmproj/i.test(name) &&
      (!isGgufPart(name) || /-00001-of-\d{5}\.gguf$/i.test(name)),
  );

export const isGgufPart = (name: string): boolean => /-\d{5}-of-\d{5}\.gguf$/i.test(name);

/** PyTorch's files, and what others save in the same way. */
const PICKLE_NAME = /\.(bin|pt|pth|ckpt|pkl|pickle)$/i;

/** Call where no other weights are among `names`. @throws MaskrouteError `unsupported_model`. */
export function refusePickles(names: readonly string[]): void {
  const name = names.find((candidate) => PICKLE_NAME.test(candidate));
  if (name !== undefined) throw pickle(name);
}

/** By its content: names lie. */
async function isPickle(file: string): Promise<boolean> {
  const handle = await openRegular(file);
  try {
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(4), 0, 4, 0);
    // `torch.save` writes zip archives, and wrote bare pickles before 1.6; those begin with their protocol's number.
    const isZip = bytesRead === 4 && buffer.readUInt32BE(0) === 0x504b0304;
    return isZip || (bytesRead >= 2 && buffer[0] === 0x80 && buffer[1]! <= 5);
  } finally {
    await handle.close();
  }
}

const pickle = (name: string): MaskrouteError =>
  unsupportedModel(
    `${quoted(name)} is a pickle file, and reading one runs code of whoever wrote it; ` +
      'convert it to safetensors where you trust it (save_pretrained of transformers writes safetensors)',
  );
