/**
 * The whole way for a model of each family, in each format of its files: pulled, served, learned on, evaluated, published, and
 * answered by the edge under the mask that was learned. One edge for all of them, and a backend each.
 */
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import OpenAI from 'openai';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { z } from 'zod';
import { type Edge, startEdge } from '../../gpu-backend/dev/local-edge.ts';
import { evaluationSchema } from '../../gpu-backend/learning/evaluation/result.ts';
import type { ModelConfig } from '../../gpu-backend/model/model-source.ts';
import { ropeFrequencies } from '../../gpu-backend/model/rope.ts';
import { openInstalled } from '../../gpu-backend/model/store.ts';
import { isFastByColumn } from '../../gpu-backend/onnx/signed-codes.ts';
import { createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import { createdKeySchema, tenantSchema } from '../../shared/admin/admin-wire.ts';
import { maskSetSchema, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { saidInProcess } from '../gpu-backend/cli/in-process.ts';
import { writeSmallData } from '../gpu-backend/learning/small-run.ts';
import { ADMIN_KEY, BACKEND_KEY } from '../support/edge/constants.ts';
import { ggufParts, hubConfig, safetensorsFiles, storedTensors } from '../support/family-files.ts';
import { splitGguf, writeGguf } from '../support/gguf.ts';
import { asGemma, randomLlama } from '../support/random-llama.ts';
import { tinyFolder } from '../support/safetensors.ts';
import { type Served, serve } from '../support/serve.ts';

const LIMIT_ms = 180_000;
const TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const SHAPE = {
  layerCount: 2,
  hiddenSize: 64,
  ffnSize: 96,
  headCount: 4,
  kvHeadCount: 2,
  headSize: 16,
  vocabularySize: 288,
};
const FAMILIES: Readonly<Record<string, Partial<ModelConfig>>> = {
  'llama-3': {
    ...SHAPE,
    architecture: 'llama',
    tiedEmbeddings: false,
    ropeTheta: 500_000,
    ropeScaling: {
      type: 'llama3',
      factor: 8,
      lowFrequencyFactor: 1,
      highFrequencyFactor: 4,
      originalContextTokens: 128,
    },
  },
  'qwen-2': { ...SHAPE, architecture: 'qwen2', attentionBias: 'qkv' },
  'qwen-3': { ...SHAPE, architecture: 'qwen3', headNorms: true, headSize: 32 },
  'granite-3': {
    ...SHAPE,
    architecture: 'granite',
    factors: { embedding: 12, blocks: 0.22, scores: 0.0625, logits: 0.125 },
  },
  'phi-3': {
    ...SHAPE,
    architecture: 'phi3',
    tiedEmbeddings: false,
    slidingWindow: { tokens: 31, layers: [0, 1] },
  },
  'gemma-3': asGemma(SHAPE),
};
const FORMS = ['safetensors', 'shards', 'gguf', 'split'] as const;
type Form = (typeof FORMS)[number];
/**
 * Those that go the whole way. The others come to the same weights as one of these, but for a Llama 3 from GGUF: its rotary
 * tables differ in the last bits.
 */
const MODELS: readonly { readonly family: string; readonly form: Form }[] = [
  { family: 'llama-3', form: 'shards' },
  { family: 'qwen-2', form: 'split' },
  { family: 'qwen-3', form: 'shards' },
  { family: 'granite-3', form: 'split' },
  { family: 'phi-3', form: 'shards' },
  { family: 'gemma-3', form: 'shards' },
];

let home = '';
let environment: Record<string, string>;
let edge: Edge;
let data: string[];
let admin: ReturnType<typeof createAdminClient>;
const backends: Served[] = [];

/** A command of the command line, without a process of its own; gives what it prints. */
async function maskroute(...args: string[]): Promise<string> {
  const { status, stdout, stderr } = await saidInProcess(environment, args);
  expect(status, `${args.join(' ')}: ${stderr}`).toBe(0);
  return stdout;
}

/** Gives the backend's address, once it answers. */
async function addressOf(model: string): Promise<string> {
  const backend = serve(model, environment);
  backends.push(backend);
  return await backend.url;
}

/** What its files are named, and so the installed model. */
const nameOf = (family: string, form: Form): string => `${family}-${form}`;

/** Writes the family's files in a form, and gives what `model pull` is told. */
async function filesOf(family: string, form: Form): Promise<string> {
  const name = nameOf(family, form);
  const folder = join(home, 'files', name);
  await mkdir(folder, { recursive: true });
  const source = randomLlama(FAMILIES[family]);
  const put = async (files: Record<string, Uint8Array | string>) => {
    for (const [name, bytes] of Object.entries(files)) await writeFile(join(folder, name), bytes);
  };
  if (form === 'safetensors' || form === 'shards') {
    const { 'model.safetensors': _, 'tokenizer_config.json': written, ...tiny } = await tinyFolder();
    const tokenizer = JSON.parse(new TextDecoder().decode(written));
    await put({
      ...tiny,
      ...safetensorsFiles(await storedTensors(source), form === 'shards' ? 3 : 1),
      'config.json': JSON.stringify(hubConfig(source.config)),
      'tokenizer_config.json': JSON.stringify({ ...tokenizer, chat_template: TEMPLATE }),
    });
    return folder;
  }
  const parts = await ggufParts(source);
  const metadata = new Map([
    ...parts.metadata,
    ['tokenizer.chat_template', { type: 'string', value: TEMPLATE }] as const,
  ]);
  if (form === 'gguf') {
    await put({ [`${name}.gguf`]: writeGguf({ ...parts, metadata }) });
    return join(folder, `${name}.gguf`);
  }
  const split = Object.entries(splitGguf({ ...parts, metadata }, 3)).map(
    ([file, bytes]) => [file.replace('tiny', name), bytes] as const,
  );
  await put(Object.fromEntries(split));
  return join(folder, split[0]![0]);
}

async function pulled(family: string, form: Form) {
  await maskroute('model', 'pull', await filesOf(family, form), '--json');
  return (await openInstalled(home, nameOf(family, form))).manifest;
}

const post = <T>(path: string, body: object, schema: z.ZodType<T>) =>
  admin.request({ method: 'POST', path, body }, schema);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), 'maskroute-families-'));
  data = await writeSmallData(join(home, 'data'));
  edge = await startEdge({
    projectFolder: resolve('.'),
    stateFolder: undefined,
    port: 0,
    // Every model has a backend of its own in the registry; none is the edge's own.
    bindings: { BACKEND_URL: 'http://127.0.0.1:9', BACKEND_KEY, ADMIN_KEY },
  });
  admin = createAdminClient(edge.url, ADMIN_KEY);
  environment = {
    MASKROUTE_HOME: home,
    MASKROUTE_BACKEND_KEY: BACKEND_KEY,
    MASKROUTE_ADMIN_KEY: ADMIN_KEY,
    BACKEND_PORT: '0',
  };
}, LIMIT_ms);

afterAll(async () => {
  await edge?.close();
  await Promise.all(backends.map((backend) => backend.kill()));
  if (home !== '') await rm(home, { recursive: true, force: true });
}, LIMIT_ms);

/**
 * Their files differ most from form to form: rotary tables, stacks, added norms. Logits of all families from both forms are in
 * `gpu-backend/model/architectures/families.test.ts`.
 */
const IN_ALL_FORMS = ['llama-3', 'phi-3', 'gemma-3'];

describe.each(IN_ALL_FORMS)('%s', (family) => {
  test('every form of its files comes to the same weights', async () => {
    const found = new Map<Form, string>();
    const frequencies = new Map<Form, Float64Array>();
    for (const form of FORMS) {
      const { files, config } = await pulled(family, form);
      found.set(form, files['weights.bin']!.sha256);
      frequencies.set(form, ropeFrequencies(config));
      expect(config).toMatchObject({ architecture: FAMILIES[family]!.architecture });
    }
    expect(found.get('shards')).toBe(found.get('safetensors'));
    expect(found.get('split')).toBe(found.get('gguf'));
    // Rotary tables of GGUF come from factors in single precision; the rest is the same.
    if (family !== 'llama-3') expect(found.get('gguf')).toBe(found.get('safetensors'));
    frequencies.get('gguf')!.forEach((frequency, i) => {
      expect(frequency / frequencies.get('safetensors')![i]!).toBeCloseTo(1, 6);
    });
  });
});

test.each([
  ['q8', await isFastByColumn()],
  ['f32', false],
] as const)('a pull with %s speaks of weights by column where they are faster: %s', async (weights, are) => {
  const file = await filesOf('qwen-2', 'gguf');
  const said = await maskroute('model', 'pull', file, '--weights', weights, '--force');
  expect(said).toContain(`(${weights}) is installed in`);
  expect(said.includes('--weights q8-columns')).toBe(are);
});

test(
  'each is served, and the edge knows it',
  async () => {
    for (const { family, form } of MODELS.filter(({ family }) => !IN_ALL_FORMS.includes(family))) {
      const { config } = await pulled(family, form);
      expect(config).toMatchObject({ architecture: FAMILIES[family]!.architecture });
    }
    const names = MODELS.map(({ family, form }) => nameOf(family, form));
    const urls = await Promise.all(names.map(addressOf));
    for (const [i, id] of names.entries())
      await post('/backends', { id, url: urls[i]! }, z.object({ id: z.literal(id) }));
  },
  LIMIT_ms,
);

describe.each(MODELS)('$family from $form', ({ family, form }) => {
  const name = nameOf(family, form);
  const out = () => join(home, 'out', name);
  const file = () => join(out(), 'mask-set.json');
  const model = ['--model', name];

  test(
    'is learned on and evaluated',
    async () => {
      await maskroute(
        ...['learn', ...model, '--data', ...data, '--clusters', '1', '--sparsity', '0.25', '--quick'],
        ...['--out', out(), '--json'],
      );
      const set = maskSetSchema.parse(JSON.parse(await readFile(file(), 'utf8')));
      expect(set.clusters.map(({ bits }) => bits)).not.toContain('f');
      expect(set.reachedSparsity).toBe(0.25);
      const evaluation = await maskroute(
        ...['evaluate', ...model, '--mask-set', file(), '--data', ...data, '--baselines', 'last-k', '--json'],
        ...['--limit', '4', '--rounds', '1', '--threads', '1', '--no-equal-time'],
      );
      const { rows, ...found } = evaluationSchema.parse(JSON.parse(evaluation.trim().split('\n').at(-1)!));
      expect(found).toMatchObject({ model: name, weights: 'q8' });
      const [dense, learned] = ['dense', 'learned'].map(
        (method) => rows.find((row) => row.method === method)!,
      );
      expect(dense).toMatchObject({ sparsity: 0, kl: 0 });
      expect(learned).toMatchObject({ sparsity: 0.25, maskSet: maskSetVersion(set) });
      expect(learned!.kl).toBeGreaterThan(0);
    },
    LIMIT_ms,
  );

  test(
    'is published, and the edge has its backend answer under the mask that was learned',
    async () => {
      await post('/tenants', { id: name, name }, tenantSchema);
      const { key } = await post('/keys', { tenant: name, name }, createdKeySchema);
      await maskroute('publish', file(), '--edge', edge.url, '--tenant', name, '--activate', '--yes');
      const { clusters } = maskSetSchema.parse(JSON.parse(await readFile(file(), 'utf8')));
      const client = new OpenAI({ baseURL: `${edge.url}/v1`, apiKey: key, maxRetries: 0 });
      const { data: answer, response } = await client.chat.completions
        .create({
          model: name,
          messages: [{ role: 'user', content: 'Please book me a flight to Rome for tomorrow.' }],
          max_tokens: 4,
          // A random model may end at once.
          ...{ ignore_eos: true },
        })
        .withResponse();
      expect(answer).toMatchObject({ model: name, usage: { completion_tokens: 4 } });
      expect(response.headers.get('x-maskroute-mask')).toBe(clusters[0]!.mask);
      expect(response.headers.get('x-maskroute-backend')).toBe(name);
    },
    LIMIT_ms,
  );
});
