/**
 * Finds the model in a file or folder on this machine. Pickle files are refused unread, because reading a pickle runs its
 * author's code.
 */
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { openRegular, readRegular } from '../../files.ts';
import { ggufPart } from '../formats/gguf.ts';
import type { LocalModel } from '../import-model.ts';
import { quoted, unsupportedModel } from '../model-source.ts';

/** @throws MaskrouteError `unsupported_model`, `invalid_request`, and as `openRegular`. */
export async function modelInFile(file: string): Promise<LocalModel> {
  const name = path.basename(file);
  if (/\.safetensors$/i.test(name)) {
    throw new MaskrouteError(
      'invalid_request',
      `${name} has weights only: name its folder, which needs config.json and tokenizer.json, too.`,
    );
  }
  await refusePointers(path.dirname(file), [name]);
  if (await isPickle(file)) throw pickle(name);
  return { kind: 'gguf', path: file, source: `file:${name}` };
}

/**
 * A folder with config.json and weights, or with one GGUF model, whole or in parts.
 * @throws MaskrouteError `unsupported_model`, `invalid_request` when there are several models.
 */
export async function modelInFolder(folder: string, source: string): Promise<LocalModel> {
  const names = (await readdir(folder)).sort();
  await refusePointers(folder, names);
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

/** The names of GGUF models; the first part of a model in parts. Image projectors (`mmproj`) are no models. */
export const ggufModels = (names: readonly string[]): string[] =>
  names.filter(
    (name) => /\.gguf$/i.test(name) && !/^mmproj/i.test(name) && (ggufPart(name)?.number ?? 1) === 1,
  );

const POINTER_BEGINNING = 'version https://git-lfs.github.com/spec/';
const POINTER_BYTES_MAX = 1024;

/** A clone without Git LFS has small texts in place of weights, and of large tokenizers. */
async function refusePointers(folder: string, names: readonly string[]): Promise<void> {
  for (const name of names.filter((one) => /\.(safetensors|gguf|json)$/i.test(one))) {
    // What cannot be read is refused where it is needed.
    const bytes = await readRegular(path.join(folder, name), POINTER_BYTES_MAX).catch(() => undefined);
    if (!bytes?.toString().startsWith(POINTER_BEGINNING)) continue;
    throw new MaskrouteError(
      'invalid_request',
      `${name} is a pointer of Git LFS, not the file itself: run git lfs pull in its folder.`,
    );
  }
}

/** Extensions of PyTorch's files and of other pickles. */
const PICKLE_NAME = /\.(bin|pt|pth|ckpt|pkl|pickle)$/i;

/** Call when there are no other weights among `names`. @throws MaskrouteError `unsupported_model`. */
export function refusePickles(names: readonly string[]): void {
  const name = names.find((candidate) => PICKLE_NAME.test(candidate));
  if (name !== undefined) throw pickle(name);
}

/** By content, as names may be wrong. */
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
    `${quoted(name)} is a pickle file, and reading a pickle runs its author's code; ` +
      'if you trust it, convert it to safetensors (save_pretrained of transformers writes safetensors)',
  );
