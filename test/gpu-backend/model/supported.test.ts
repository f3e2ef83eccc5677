/**
 * Every row of the tables in docs/models.md, held to a checkpoint or a file: what is not here is not promised. The checkpoints
 * of families are imported and compared with transformers in `architectures/families.test.ts`, all of them.
 */
import { readFileSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { familyOf } from '../../../gpu-backend/encoder/encoder-files.ts';
import { ENCODERS, FULL_ENCODER } from '../../../gpu-backend/encoder/encoder-service.ts';
import { emitModel, WEIGHTS_FILE } from '../../../gpu-backend/model/emit.ts';
import { decoderTensors } from '../../../gpu-backend/model/families.ts';
import { tensorType } from '../../../gpu-backend/model/formats/dequantize.ts';
import { openGguf } from '../../../gpu-backend/model/formats/gguf.ts';
import { configFromHuggingFace } from '../../../gpu-backend/model/formats/hf-config.ts';
import { openSafetensorsFolder } from '../../../gpu-backend/model/formats/hf-folder.ts';
import { ARCHITECTURES, type OpenModelFile } from '../../../gpu-backend/model/model-source.ts';
import { refusePickles } from '../../../gpu-backend/model/sources/local.ts';
import { readStoredLlama } from '../../../gpu-backend/model/stored-llama.ts';
import {
  ggufParts,
  hubConfig,
  readAll,
  safetensorsFiles,
  storedTensors,
} from '../../support/family-files.ts';
import { splitGguf, writeGguf } from '../../support/gguf.ts';
import { randomLlama } from '../../support/random-llama.ts';
import { writeSafetensors } from '../../support/safetensors.ts';
import encoders from '../encoder/fixtures/encoders.json' with { type: 'json' };
import figures from './architectures/fixtures/families.json' with { type: 'json' };

type Variant = (typeof figures.variants)[number];
type Config = {
  readonly rope_scaling?: { readonly rope_type?: string } | null;
  readonly rope_parameters?: { readonly rope_type?: string };
  readonly tie_word_embeddings?: boolean;
  readonly hidden_size?: number;
  readonly head_dim?: number;
  readonly num_attention_heads?: number;
  readonly num_key_value_heads?: number;
  readonly sliding_window?: number | null;
  readonly no_rope_layers?: readonly number[];
  readonly layer_types?: readonly string[];
  readonly embedding_multiplier?: number;
  readonly residual_multiplier?: number;
  readonly attention_multiplier?: number;
  readonly logits_scaling?: number;
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

type Claim = (variant: Variant) => boolean;

describe('families', () => {
  const configOf = ({ config }: Variant) => config as unknown as Config;
  const ropeOf = (variant: Variant) => {
    const { rope_scaling, rope_parameters } = configOf(variant);
    return (rope_scaling ?? rope_parameters)?.rope_type ?? 'default';
  };
  const scaled =
    (type: string): Claim =>
    (variant) =>
      ropeOf(variant) === type;
  const has =
    (fits: (config: Config) => boolean): Claim =>
    (variant) =>
      fits(configOf(variant));
  /** Whether the first layer has a tensor. */
  const holds =
    (name: string): Claim =>
    ({ config }) =>
      decoderTensors(configFromHuggingFace(config)).some(
        (tensor) => tensor.name === `model.layers.0.${name}`,
      );
  /** Whether a tensor of the first layer is in such a stack. */
  const stacks =
    (stack: string, name: string): Claim =>
    ({ config }) =>
      decoderTensors(configFromHuggingFace(config)).some(
        (tensor) =>
          tensor.name.endsWith(`.0.${name}.weight`) && tensor.hubName.endsWith(`.0.${stack}.weight`),
      );
  const plain = scaled('default');
  const changes = (factor: number | undefined) => factor !== undefined && factor !== 1;
  const isTied = has(({ tie_word_embeddings }) => tie_word_embeddings === true);
  const isUntied = has(({ tie_word_embeddings }) => tie_word_embeddings === false);
  const both =
    (...claims: Claim[]): Claim =>
    (variant) =>
      claims.every((claim) => claim(variant));
  /** What a row says, and which checkpoints of the family have it. */
  const CLAIMS: Readonly<Record<string, Claim>> = {
    'Llama 2': both(
      plain,
      has((config) => config.num_key_value_heads === config.num_attention_heads),
    ),
    '3': scaled('llama3'),
    '3.1': both(scaled('llama3'), isUntied),
    '3.2': both(scaled('llama3'), isTied),
    SmolLM2: both(plain, isTied),
    'llama3 scaling of rotary': scaled('llama3'),
    'biases of attention': both(holds('self_attn.q_proj.bias'), holds('self_attn.o_proj.bias')),
    'with its sliding window': has(({ sliding_window }) => typeof sliding_window === 'number'),
    'or without': has(({ sliding_window }) => sliding_window === null),
    'layers without rotary': has(({ no_rope_layers }) => no_rope_layers?.includes(0) === true),
    'a window in them': has(
      ({ no_rope_layers, layer_types }) =>
        layer_types?.some((type, i) => type === 'sliding_attention' && no_rope_layers?.[i] === 0) === true,
    ),
    Qwen2: plain,
    'Qwen2.5': plain,
    'biases of Q': holds('self_attn.q_proj.bias'),
    'K and V': both(holds('self_attn.k_proj.bias'), holds('self_attn.v_proj.bias')),
    'a window in upper layers': has(
      ({ layer_types }) =>
        layer_types?.[0] === 'full_attention' && layer_types.at(-1) === 'sliding_attention',
    ),
    'Granite 3 without experts': has(({ logits_scaling }) => logits_scaling !== undefined),
    'factors of embedding': has(({ embedding_multiplier }) => changes(embedding_multiplier)),
    blocks: has(({ residual_multiplier }) => changes(residual_multiplier)),
    scores: has(({ attention_multiplier }) => changes(attention_multiplier)),
    logits: has(({ logits_scaling }) => changes(logits_scaling)),
    'Phi-3 with a context of 4k': has(({ sliding_window }) => typeof sliding_window === 'number'),
    'one matrix for Q to V': both(
      ...['q', 'k', 'v'].map((letter) => stacks('self_attn.qkv_proj', `self_attn.${letter}_proj`)),
    ),
    'one for gate and up': both(
      stacks('mlp.gate_up_proj', 'mlp.gate_proj'),
      stacks('mlp.gate_up_proj', 'mlp.up_proj'),
    ),
    'Phi-4': has(({ sliding_window }) => sliding_window === null),
    'Gemma 3': holds('self_attn.post_norm.weight'),
    'norms behind blocks': both(holds('self_attn.post_norm.weight'), holds('mlp.post_norm.weight')),
    'another rotary base in layers with a window': ({ config }) =>
      configFromHuggingFace(config).localRope !== undefined,
    'norms over heads': both(holds('self_attn.q_norm.weight'), holds('self_attn.k_norm.weight')),
    'heads of any width': has(
      ({ head_dim, num_attention_heads, hidden_size }) => head_dim! * num_attention_heads! !== hidden_size,
    ),
    // Of all families.
    'tied and untied embeddings': isTied,
    'KV heads down to one': has(({ num_key_value_heads }) => num_key_value_heads === 1),
    'linear scaling of rotary': scaled('linear'),
    'dynamic scaling of rotary': scaled('dynamic'),
    'YaRN scaling of rotary': scaled('yarn'),
  };
  /** The checkpoints that show what is claimed. @throws Error where one is missing. */
  function shown(what: readonly string[], own: readonly Variant[]): Set<Variant> {
    return new Set(
      what.map((claim) => {
        const variant = own.find(CLAIMS[claim] ?? (() => false));
        if (variant === undefined) throw new Error(`no checkpoint shows "${claim}"`);
        return variant;
      }),
    );
  }
  const ofFamily = (family: string) => figures.variants.filter(({ config }) => config.model_type === family);
  const rows = rowsOf('family').map(([name, what]) => [name!.replaceAll('`', ''), what!] as const);

  test('are those that can be imported', () => {
    expect(rows.map(([name]) => name)).toEqual([...ARCHITECTURES]);
  });

  test.each(rows)('%s: %s', (family, what) => {
    expect(shown(what.split(/[,;]\s*/), ofFamily(family)).size).toBeGreaterThan(0);
  });

  test('have in common what is said of all of them', () => {
    const text = readFileSync('docs/models.md', 'utf8').replaceAll('\n', ' ');
    const [, list] = /In all of them: ([^.]*)\./.exec(text)!;
    // Of a padded vocabulary the whole way in test/e2e/families.test.ts is the proof: 265 tokens, 288 rows.
    const claims = list!.split(', ').filter((claim) => claim !== 'vocabularies that are padded');
    expect(shown(claims, figures.variants).size).toBeGreaterThan(3);
  });

  test('have no row without a checkpoint: one more claim would be missed', () => {
    expect(() => shown(['mixtures of experts'], figures.variants)).toThrow(/no checkpoint shows/);
    expect(() => shown(['norms over heads'], ofFamily('llama'))).toThrow(/no checkpoint shows/);
    expect(() => shown(['a window in upper layers'], ofFamily('qwen3'))).toThrow(/no checkpoint shows/);
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

  const forms = ['safetensors', 'GGUF'].flatMap((format) =>
    rows
      .get(format)!
      .split('; ')[0]!
      .split(' or ')
      .map((form) => `${format}, ${form}`),
  );
  const WRITERS: Readonly<Record<string, () => Promise<OpenModelFile>>> = {
    'safetensors, one file': () => openShards(1),
    'safetensors, shards with their index': () => openShards(3),
    'GGUF, one file': async () => {
      await put({ 'model.gguf': writeGguf(await ggufParts(source)) });
      return openGguf(path.join(folder, 'model.gguf'));
    },
    'GGUF, the parts that `llama-gguf-split` makes': async () => {
      const parts = splitGguf(await ggufParts(source), 3);
      await put(parts);
      return openGguf(path.join(folder, Object.keys(parts)[0]!));
    },
  };
  const openShards = async (shards: number) => {
    await put({
      ...safetensorsFiles(await storedTensors(source), shards),
      'config.json': JSON.stringify(hubConfig(source.config)),
    });
    return openSafetensorsFolder(folder);
  };

  test.each(forms)('%s: the imported weights are those that were written', async (form) => {
    expect(WRITERS[form], `no test writes ${form}`).toBeDefined();
    expect(await importedDown(await WRITERS[form]!())).toEqual((await readAll(source)).get(DOWN)!.data);
  });

  test('pickles are refused by each name that is said', () => {
    const [name, what] = [...rows].find(([kind]) => kind.startsWith('pickles'))!;
    expect(what).toMatch(/^never/);
    const endings = [...name.matchAll(/`(\.\w+)`/g)].map(([, ending]) => ending!);
    expect(endings.length).toBeGreaterThan(1);
    for (const ending of endings) expect(() => refusePickles([`model${ending}`])).toThrow(/pickle/i);
  });

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

test('encoders are those that are held against transformers, pooled and begun as their families are', async () => {
  const told = rowsOf('name').map(([name, pooling, before]) => [
    name!.replaceAll('`', ''),
    pooling!,
    before!,
  ]);
  expect(told.map(([name]) => name)).toEqual(Object.keys(ENCODERS));
  const others = new Map(encoders.encoders.map((encoder) => [encoder.id, encoder] as const));
  for (const [name, pooling, before] of told) {
    const id = ENCODERS[name!]!;
    const { name: _, ...family } = familyOf(id);
    expect(family.pooling).toBe(pooling === 'first token' ? 'cls' : pooling);
    expect(family.prefix).toBe(before === 'nothing' ? '' : before!.slice(1, -1));
    if (name !== FULL_ENCODER) expect(others.get(id)?.pooling, `no test has ${id}`).toBe(family.pooling);
  }
});
