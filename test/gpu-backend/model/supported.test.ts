/** Every row of the tables in docs/models.md, held to a checkpoint that is imported and compared: what is not here is not promised. */
import { readFileSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { emitModel, WEIGHTS_FILE } from '../../../gpu-backend/model/emit.ts';
import { tensorType } from '../../../gpu-backend/model/formats/dequantize.ts';
import { openGguf } from '../../../gpu-backend/model/formats/gguf.ts';
import { configFromHuggingFace } from '../../../gpu-backend/model/formats/hf-config.ts';
import { openSafetensorsFolder } from '../../../gpu-backend/model/formats/hf-folder.ts';
import { ARCHITECTURES, type OpenModelFile } from '../../../gpu-backend/model/model-source.ts';
import { readStoredLlama } from '../../../gpu-backend/model/stored-llama.ts';
import { denseMask } from '../../../shared/mask/mask.ts';
import { ggufParts, hubConfig, readAll, safetensorsFiles } from '../../support/family-files.ts';
import { writeGguf } from '../../support/gguf.ts';
import { openEmitted, randomLlama } from '../../support/random-llama.ts';
import { writeSafetensors } from '../../support/safetensors.ts';
import figures from './architectures/fixtures/families.json' with { type: 'json' };

type Variant = (typeof figures.variants)[number];
type Config = Record<string, unknown> & {
  rope_scaling?: { rope_type?: string } | null;
  rope_parameters?: { rope_type?: string };
};

/** The rows of the table whose first heading is `heading`. */
function rowsOf(heading: string): string[][] {
  const text = readFileSync('docs/models.md', 'utf8');
  const table = text.split('\n\n').find((block) => block.startsWith(`| ${heading} |`))!;
  const cells = (line: string) =>
    line
      .slice(1, -1)
      .split('|')
      .map((cell) => cell.trim());
  return table.trim().split('\n').slice(2).map(cells);
}

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-supported-'));
});
afterEach(() => rm(folder, { recursive: true }));

const put = async (files: Record<string, Uint8Array | string>) => {
  for (const [name, bytes] of Object.entries(files)) await writeFile(path.join(folder, name), bytes);
};

describe('families', () => {
  const ropeOf = ({ config }: Variant) => {
    const { rope_scaling, rope_parameters } = config as unknown as Config;
    return (rope_scaling ?? rope_parameters)?.rope_type ?? 'default';
  };
  const named = (part: string) => (variant: Variant) => variant.name.includes(part);
  const scaled = (type: string) => (variant: Variant) => ropeOf(variant) === type;
  const plain = scaled('default');
  /** What a row says, and the checkpoint of the family that has it. */
  const CLAIMS: Readonly<Record<string, (variant: Variant) => boolean>> = {
    'Llama 2': named('Llama 2'),
    '3': scaled('llama3'),
    '3.1': named('Llama 3.1'),
    '3.2': named('Llama 3.2'),
    SmolLM2: plain,
    llama3: scaled('llama3'),
    linear: scaled('linear'),
    'dynamic and YaRN scaling of rotary': scaled('dynamic'),
    'biases of attention': named('biases'),
    'with its sliding window': named('sliding window'),
    'or without': named('no window'),
    'layers without rotary': plain,
    'a window in them': named('window without rope'),
    Qwen2: plain,
    'Qwen2.5': plain,
    'biases of Q': plain,
    'K and V': plain,
    'a window in upper layers': named('window in upper'),
    'norms over heads': plain,
    'heads of any width': named('wide heads'),
  };
  const rows = rowsOf('family').map(([name, what]) => [name!.replaceAll('`', ''), what!] as const);

  test('are those that can be imported', () => {
    expect(rows.map(([name]) => name)).toEqual([...ARCHITECTURES]);
  });

  test.each(rows)('%s: %s', async (family, what) => {
    const own = figures.variants.filter(({ config }) => config.model_type === family);
    const chosen = new Set<Variant>();
    for (const claim of what.split(/[,;]\s*/)) {
      const variant = own.find(CLAIMS[claim] ?? (() => false));
      expect(variant?.name, `no checkpoint shows "${claim}"`).toBeDefined();
      chosen.add(variant!);
    }
    for (const variant of chosen) {
      const source = randomLlama(configFromHuggingFace(variant.config));
      await put({
        ...safetensorsFiles(await readAll(source), 2),
        'config.json': JSON.stringify(variant.config),
      });
      const opened = await openSafetensorsFolder(folder);
      await using runner = await openEmitted(opened, 'f32');
      await opened.close();
      const plan = { mask: denseMask(2 * source.config.layerCount), kv: 'preserve' as const };
      const logits = await runner.run({
        ...{ cache: runner.newCache(), tokenIds: figures.tokens, plan },
        logitRows: figures.rows,
      });
      const width = source.config.vocabularySize;
      for (const [i, row] of variant.dense.entries())
        for (const [j, value] of row.entries())
          expect(Math.abs(logits[i * width + 16 * j]! - value)).toBeLessThan(1e-3);
    }
  });
});

describe('files', () => {
  type Case = { type: number; name: string; bytes: string; values: string };
  const cases: Case[] = JSON.parse(
    readFileSync(new URL('formats/fixtures/dequantize.json', import.meta.url), 'utf8'),
  );
  const rows = new Map(rowsOf('files').map(([name, what]) => [name!, what!]));
  const ORDER = ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K'];
  /** `A to B` stands for all types between the two. */
  const typesIn = (text: string): string[] =>
    text.split(/, /).flatMap((part) => {
      const [first, last = first] = part.split(' to ');
      return first === last ? [part] : ORDER.slice(ORDER.indexOf(first!), ORDER.indexOf(last!) + 1);
    });
  const claimed = (format: string) => typesIn(rows.get(format)!.split('; ')[1]!);

  test('are of three kinds, with all types that can be read', () => {
    expect([...rows.keys()].map((name) => name.split(' ')[0])).toEqual(['safetensors', 'GGUF', 'pickles']);
    expect(claimed('safetensors').sort()).toEqual(['BF16', 'F16', 'F32']);
    expect(claimed('GGUF').sort()).toEqual(cases.map(({ name }) => name).sort());
  });

  const CONFIG = {
    layerCount: 1,
    hiddenSize: 256,
    ffnSize: 256,
    headCount: 4,
    kvHeadCount: 4,
    headSize: 64,
  } as const;
  const source = randomLlama({ ...CONFIG, vocabularySize: 288 });
  const DOWN = 'model.layers.0.mlp.down_proj.weight';

  /** The reference's blocks and values, again and again, as many as the matrix has. */
  function repeated({ type, bytes, values }: Case): { bytes: Uint8Array; values: Float32Array } {
    const [blocks, expected] = [bytes, values].map((text) => Uint8Array.from(Buffer.from(text, 'base64')));
    const floats = new Float32Array(expected!.buffer);
    const count = CONFIG.hiddenSize * CONFIG.ffnSize;
    const kind = tensorType(type)!;
    const length = (count / kind.blockSize) * kind.blockBytes;
    return {
      bytes: Uint8Array.from({ length }, (_, i) => blocks![i % blocks!.length]!),
      values: Float32Array.from({ length: count }, (_, i) => floats[i % floats.length]!),
    };
  }

  async function importedDown(opened: OpenModelFile): Promise<Float32Array> {
    await emitModel(opened, 'f32', folder, () => {});
    await opened.close();
    const { down } = (await readStoredLlama(folder, opened.config)).layers[0]!;
    const { offset, bytes } = down.values;
    const weights = await readFile(path.join(folder, WEIGHTS_FILE));
    return new Float32Array(Uint8Array.from(weights.subarray(offset, offset + bytes)).buffer);
  }

  test.each(claimed('GGUF'))('GGUF with %s: the imported weights are the reference’s', async (name) => {
    const one = cases.find((found) => found.name === name)!;
    const { bytes, values } = repeated(one);
    const parts = await ggufParts(source);
    const tensors = parts.tensors.map((tensor) =>
      tensor.name === 'blk.0.ffn_down.weight' ? { ...tensor, type: one.type, data: bytes } : tensor,
    );
    await put({ 'model.gguf': writeGguf({ ...parts, tensors }) });
    expect(await importedDown(await openGguf(path.join(folder, 'model.gguf')))).toEqual(values);
  });

  test.each(claimed('safetensors'))(
    'safetensors with %s: the imported weights are the reference’s',
    async (name) => {
      const { bytes, values } = repeated(cases.find((found) => found.name === name)!);
      const all = await readAll(source);
      // The writer takes floats: it puts their bytes into the file as they are.
      const down = { shape: all.get(DOWN)!.shape, data: new Float32Array(bytes.buffer) };
      await put({
        'model.safetensors': writeSafetensors(new Map([...all, [DOWN, down]]), { [DOWN]: { dtype: name } }),
        'config.json': JSON.stringify(hubConfig(source.config)),
      });
      expect(await importedDown(await openSafetensorsFolder(folder))).toEqual(values);
    },
  );
});

test('tokenizers are those whose ids are held against the reference', () => {
  const tested = readFileSync(new URL('tokenizer/families.test.ts', import.meta.url), 'utf8');
  const unigram = readFileSync(new URL('tokenizer/fixtures/unigram.json', import.meta.url), 'utf8');
  /** Both normalize with SentencePiece's table of that name. */
  const TABLES: Readonly<Record<string, string>> = { T5: 'nmt_nfkc', 'XLM-R': 'nmt_nfkc' };
  const models = new Map(
    (JSON.parse(unigram).models as { name: string; ids: number[][] }[]).map(({ name, ids }) => [name, ids]),
  );
  for (const [what, from] of rowsOf('tokenizer')) {
    expect(from).toBe('tokenizer.json, GGUF');
    const names = what!
      .split(': ')[1]!
      .split(', ')
      .filter((name) => !name.startsWith('each'));
    for (const name of names) {
      const isTested = what!.includes('unigram')
        ? (models.get(TABLES[name] ?? '')?.length ?? 0) > 100
        : ['tokenizer.json', 'GGUF'].every((kind) => new RegExp(`'${name}[\\d.]*, ${kind}'`).test(tested));
      expect(isTested, `no test has the tokenizer of ${name}`).toBe(true);
    }
  }
});
