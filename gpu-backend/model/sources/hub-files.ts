/** Which files of a hub repository make a model: the original weights before a quantized repackaging of them. */
import type { ListFileEntry } from '@huggingface/hub';
import { unsupportedModel } from '../model-errors.ts';

export type ChosenFiles = { readonly kind: 'folder' | 'gguf'; readonly files: readonly ListFileEntry[] };

const FOLDER_FILES = ['config.json', 'tokenizer.json'];
const OPTIONAL_FILES = [
  'tokenizer_config.json',
  'generation_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'model.safetensors.index.json',
];
/** Nearest to the original first; all of them are read. */
const GGUF_PREFERENCE = [
  'q8_0',
  'q6_k',
  'q5_k_m',
  'q5_k_s',
  'q4_k_m',
  'q4_k_s',
  'q4_1',
  'q4_0',
  'bf16',
  'f16',
  'f32',
];

/** @throws MaskrouteError `unsupported_model` with what is missing. */
export function chooseFiles(
  repository: string,
  entries: readonly ListFileEntry[],
  file: string | undefined,
): ChosenFiles {
  // Only the top folder: a path from a server never becomes a path on this machine.
  const files = new Map(
    entries
      .filter((entry) => entry.type === 'file' && /^[A-Za-z0-9][\w.+-]*$/.test(entry.path))
      .map((entry) => [entry.path, entry]),
  );
  if (file !== undefined) {
    const entry = files.get(file);
    if (entry === undefined) throw unsupportedModel(`${repository} has no file ${file}`);
    return { kind: 'gguf', files: [entry] };
  }
  const weights = safetensors(files);
  if (weights.length > 0 && FOLDER_FILES.every((name) => files.has(name))) {
    const beside = [...FOLDER_FILES, ...OPTIONAL_FILES].flatMap((name) => files.get(name) ?? []);
    return { kind: 'folder', files: [...beside, ...weights] };
  }
  const gguf = bestGguf([...files.values()]);
  if (gguf !== undefined) return { kind: 'gguf', files: [gguf] };
  throw unsupportedModel(
    `${repository} has neither config.json, tokenizer.json and *.safetensors nor a *.gguf file`,
  );
}

function safetensors(files: ReadonlyMap<string, ListFileEntry>): ListFileEntry[] {
  const single = files.get('model.safetensors');
  if (single !== undefined) return [single];
  return [...files.values()].filter((entry) => /^model-\d{5}-of-\d{5}\.safetensors$/.test(entry.path));
}

function bestGguf(entries: readonly ListFileEntry[]): ListFileEntry | undefined {
  const candidates = entries.filter(({ path }) => /\.gguf$/i.test(path) && !/-of-\d{5}\.gguf$/i.test(path));
  for (const kind of GGUF_PREFERENCE) {
    const match = candidates.find(({ path }) => path.toLowerCase().endsWith(`${kind}.gguf`));
    if (match !== undefined) return match;
  }
  return candidates[0];
}
