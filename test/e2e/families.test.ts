/**
 * The whole way for a model of each family, in each form of its files: pulled, served, learned on, evaluated, published, and
 * answered by the edge under the mask that was learned. One edge for all of them, and a backend each.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { text } from 'node:stream/consumers';
import OpenAI from 'openai';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { z } from 'zod';
import { pullModel } from '../../gpu-backend/cli/models.ts';
import { type Edge, startEdge } from '../../gpu-backend/dev/local-edge.ts';
import type { ModelConfig } from '../../gpu-backend/model/model-source.ts';
import { createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import { createdKeySchema, tenantSchema } from '../../shared/admin/admin-wire.ts';
import { writeSmallData } from '../gpu-backend/learning/small-run.ts';
import { ADMIN_KEY, BACKEND_KEY } from '../support/edge/constants.ts';
import { ggufParts, hubConfig, readAll, safetensorsFiles } from '../support/family-files.ts';
import { splitGguf, writeGguf } from '../support/gguf.ts';
import { randomLlama } from '../support/random-llama.ts';
import { tinyFolder } from '../support/safetensors.ts';

const LIMIT_ms = 180_000;
const CLI = resolve('gpu-backend/cli/cli.ts');
const TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const SHAPE = { layerCount: 4, hiddenSize: 64, ffnSize: 128, headCount: 4, kvHeadCount: 2, headSize: 16 };
const FAMILIES: Readonly<Record<string, Partial<ModelConfig>>> = {
  'llama-3': {
    ...{ ...SHAPE, architecture: 'llama', vocabularySize: 288, tiedEmbeddings: false, ropeTheta: 500_000 },
    ropeScaling: {
      type: 'llama3',
      factor: 8,
      lowFrequencyFactor: 1,
      highFrequencyFactor: 4,
      originalContextTokens: 128,
    },
  },
  'qwen-2': { ...SHAPE, architecture: 'qwen2', vocabularySize: 288, attentionBias: 'qkv' },
  'qwen-3': { ...SHAPE, architecture: 'qwen3', vocabularySize: 288, headNorms: true, headSize: 32 },
};
const FORMS = ['safetensors', 'shards', 'gguf', 'split'] as const;
type Form = (typeof FORMS)[number];

let home = '';
let edge: Edge;
let data: string[];
const children: ChildProcess[] = [];

const environment = () => ({
  ...process.env,
  MASKROUTE_HOME: home,
  MASKROUTE_BACKEND_KEY: BACKEND_KEY,
  MASKROUTE_ADMIN_KEY: ADMIN_KEY,
  BACKEND_PORT: '0',
});

async function maskroute(...args: string[]): Promise<string> {
  const child = spawn(process.execPath, [CLI, ...args], { env: environment() });
  const [out, errors, [status]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, 'exit'),
  ]);
  expect(status, `${args.join(' ')}: ${errors}`).toBe(0);
  return out;
}

async function serve(model: string): Promise<string> {
  const child = spawn(process.execPath, [CLI, 'serve', '--model', model], {
    env: { ...environment(), MASKROUTE_EDGE_URL: edge.url },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  children.push(child);
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (part: string) => {
    output += part;
  });
  const url = () => /"url":"([^"]+)"/.exec(output)?.[1];
  await vi.waitFor(() => expect(url()).toBeDefined(), LIMIT_ms);
  return url()!;
}

/** Writes the family's files in a form, and gives what `model pull` is told. */
async function filesOf(family: string, form: Form): Promise<string> {
  const folder = join(home, 'files', `${family}-${form}`);
  await mkdir(folder, { recursive: true });
  const source = randomLlama(FAMILIES[family]);
  const put = async (files: Record<string, Uint8Array | string>) => {
    for (const [name, bytes] of Object.entries(files)) await writeFile(join(folder, name), bytes);
  };
  if (form === 'safetensors' || form === 'shards') {
    const { 'model.safetensors': _, 'tokenizer_config.json': written, ...tiny } = await tinyFolder();
    const tokenizer = JSON.parse(new TextDecoder().decode(written));
    await put({
      ...{ ...tiny, ...safetensorsFiles(await readAll(source), form === 'shards' ? 3 : 1) },
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
    await put({ 'model.gguf': writeGguf({ ...parts, metadata }) });
    return join(folder, 'model.gguf');
  }
  const split = splitGguf({ ...parts, metadata }, 3);
  await put(split);
  return join(folder, Object.keys(split)[0]!);
}

const hooks = { onProgress: () => {}, log: () => {} };

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
}, LIMIT_ms);

afterAll(async () => {
  await edge?.close();
  for (const child of children) {
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
  if (home !== '') await rm(home, { recursive: true, force: true });
}, LIMIT_ms);

describe.each(Object.keys(FAMILIES))('%s', (family) => {
  test('every form of its files comes to the same weights', async () => {
    const found = new Map<Form, string>();
    for (const form of FORMS) {
      const spec = await filesOf(family, form);
      const { manifest } = await pullModel(spec, { home, weights: 'q8', ...hooks });
      found.set(form, manifest.files['weights.bin']!.sha256);
      expect(manifest.config).toMatchObject({ architecture: FAMILIES[family]!.architecture });
    }
    expect(found.get('shards')).toBe(found.get('safetensors'));
    expect(found.get('split')).toBe(found.get('gguf'));
    // Rotary tables of GGUF come from factors in single precision; the rest is the same.
    if (family !== 'llama-3') expect(found.get('gguf')).toBe(found.get('safetensors'));
  });

  test(
    'pull, learn, evaluate, publish, serve, and an answer of the edge under the mask',
    async () => {
      const spec = await filesOf(family, 'shards');
      const { name } = JSON.parse(await maskroute('model', 'pull', spec, '--json')) as { name: string };
      const out = join(home, 'out', family);
      const model = ['--model', name];
      await maskroute(
        ...['learn', ...model, '--data', ...data, '--clusters', '2', '--masks', '1'],
        ...['--sparsity', '0.25', '--quick', '--name', family, '--out', out, '--json'],
      );
      const file = join(out, 'mask-set.json');
      const evaluation = await maskroute(
        ...['evaluate', ...model, '--mask-set', file, '--data', ...data, '--baselines', 'last-k', '--json'],
        ...['--limit', '4', '--rounds', '1', '--no-equal-time'],
      );
      expect(JSON.parse(evaluation.trim().split('\n').at(-1)!)).toMatchObject({ model: name, weights: 'q8' });

      const admin = createAdminClient(edge.url, ADMIN_KEY);
      const post = <T>(path: string, body: object, schema: z.ZodType<T>) =>
        admin.request({ method: 'POST', path, body }, schema);
      await post('/tenants', { id: family, name: family }, tenantSchema);
      const { key } = await post('/keys', { tenant: family, name: family }, createdKeySchema);
      await post('/backends', { id: family, url: await serve(name) }, z.object({ id: z.literal(family) }));
      await maskroute('publish', file, '--edge', edge.url, '--tenant', family, '--activate', '--yes');

      const client = new OpenAI({ baseURL: `${edge.url}/v1`, apiKey: key, maxRetries: 0 });
      const set = JSON.parse(await readFile(file, 'utf8'));
      const ask = () =>
        client.chat.completions
          .create({
            model: name,
            messages: [{ role: 'user', content: 'Please book me a flight to Rome for tomorrow.' }],
            max_tokens: 4,
          })
          .withResponse();
      const { data: answer, response } = await ask();
      expect(answer.usage?.completion_tokens).toBeGreaterThan(0);
      expect(set.clusters.map(({ mask }: { mask: string }) => mask)).toContain(
        response.headers.get('x-maskroute-mask'),
      );
    },
    LIMIT_ms,
  );
});
