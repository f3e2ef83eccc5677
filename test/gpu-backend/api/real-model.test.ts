/**
 * The whole backend over the real model: what only real tokens, masks and times can show. Answers of a prescribed form come
 * first, in a file of their own.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import OpenAI from 'openai';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { DEFAULT_MODEL } from '../../../gpu-backend/model/sources/resolve.ts';
import { openModelText } from '../../../gpu-backend/model/tokenizer/model-text.ts';
import type { ModelHash, SurrogatesId } from '../../../shared/mask/mask.ts';
import {
  maskBits,
  maskFromSkippedLayers,
  maskId,
  sparsity,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { importTokenKey, signToken } from '../../../shared/wire/service-token.ts';
import { installedModel } from '../../support/installed-model.ts';
import { BACKEND_KEY, collect, eventually } from './harness.ts';
import './structured-output.ts';
import {
  backend,
  client,
  clientOf,
  closeRealBackend,
  home,
  openRealBackend,
  startReal,
} from './real-backend.ts';

let hash: ModelHash;
beforeAll(async () => {
  hash = (await installedModel()).manifest.hash as ModelHash;
  await openRealBackend();
}, 60_000);
afterAll(closeRealBackend);

const ask = (content: string, fields: object = {}) => ({
  model: DEFAULT_MODEL,
  messages: [{ role: 'user' as const, content }],
  temperature: 0,
  max_tokens: 12,
  ...fields,
});
const textOf = async (request: ReturnType<typeof ask>) =>
  (await client.chat.completions.create(request)).choices[0]!.message.content!;

async function gauge(name: string, of = backend): Promise<number> {
  const metrics = await (
    await fetch(`${of.url}/metrics`, { headers: { authorization: `Bearer ${BACKEND_KEY}` } })
  ).text();
  return Number(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, 'm').exec(metrics)?.[1]);
}

describe('answers', () => {
  it('know the capital of France, stop by themselves and show no special token', async () => {
    const { choices, usage } = await client.chat.completions.create(ask('What is the capital of France?'));
    expect(choices[0]).toMatchObject({ finish_reason: 'stop' });
    expect(choices[0]!.message.content).toContain('Paris');
    expect(choices[0]!.message.content).not.toContain('<|');
    expect(usage!.prompt_tokens).toBeGreaterThan(20);
  });

  it('are the same streamed, whole, alone or beside others', async () => {
    const questions = [
      'Name three colors.',
      'Write a short poem about the sea.',
      'What is 2 + 2?',
      'Say hi.',
    ];
    const alone: string[] = [];
    for (const question of questions) alone.push(await textOf(ask(question)));
    const together = await Promise.all(questions.map((question) => textOf(ask(question))));
    expect(together).toEqual(alone);
    const chunks = await collect(
      await client.chat.completions.create({ ...ask(questions[1]!), stream: true }),
    );
    expect(chunks.map(({ choices }) => choices[0]!.delta.content ?? '').join('')).toBe(alone[1]);
    expect(chunks.at(-1)).toMatchObject({ maskroute: { mask: 'dense', sparsity: 0 } });
  });

  it('follow the seed', async () => {
    const request = ask('Tell me a story.', { temperature: 1, n: 2, seed: 11, max_tokens: 6 });
    const texts = async (fields: object = {}) =>
      (await client.chat.completions.create({ ...request, ...fields })).choices.map(
        ({ message }) => message.content,
      );
    const first = await texts();
    expect(await texts()).toEqual(first);
    expect(first[0]).not.toBe(first[1]);
    expect(await texts({ seed: 12, n: 1 })).toEqual([first[1]]);
    expect(await texts({ seed: 13, n: 1 })).not.toEqual([first[0]]);
  });

  it('end at a stop string, wherever it lies in the tokens', async () => {
    const counting = (fields: object = {}) =>
      textOf(ask('Count from one to ten in words.', { max_tokens: 20, ...fields }));
    const text = await counting();
    for (const [start, length] of [
      [3, 4],
      [7, 9],
      [12, 2],
    ] as const) {
      const stop = text.slice(start, start + length);
      const stopped = await counting({ stop });
      expect(stopped).toBe(text.slice(0, text.indexOf(stop)));
    }
  });

  it('go on past the end token when asked to', async () => {
    const { choices, usage } = await client.chat.completions.create(
      ask('What is the capital of France?', { ignore_eos: true, max_tokens: 16 }),
    );
    expect(choices[0]!.finish_reason).toBe('length');
    expect(usage!.completion_tokens).toBe(16);
    const { usage: least } = await client.chat.completions.create(
      ask('What is the capital of France?', { min_tokens: 14, max_tokens: 16 }),
    );
    expect(least!.completion_tokens).toBeGreaterThanOrEqual(14);
  });
});

describe('a predicted answer', () => {
  const question = ask('Write a short poem about the sea.', { max_tokens: 60 });
  const predicted = (content: string | { type: 'text'; text: string }[], fields: object = {}) =>
    client.chat.completions.create({ ...question, prediction: { type: 'content', content }, ...fields });

  it('has what the prediction says, whole and streamed, and says what of it was of use', async () => {
    const text = await textOf(question);
    const { choices, usage } = await predicted([
      { type: 'text', text: text.slice(0, 20) },
      { type: 'text', text: text.slice(20) },
    ]);
    // Near ties may go the other way, since the rows of attention are summed in another order; and how many tokens are predicted
    // at a time depends on how long steps take.
    const expectUse = (found: typeof usage | null, content: string) => {
      const { accepted_prediction_tokens, rejected_prediction_tokens } = found!.completion_tokens_details!;
      expect(content.slice(0, 30)).toBe(text.slice(0, 30));
      expect(accepted_prediction_tokens).toBeGreaterThan(20);
      expect(rejected_prediction_tokens).toBeLessThan(accepted_prediction_tokens!);
    };
    expectUse(usage, choices[0]!.message.content!);
    const streamed = await client.chat.completions.create({
      ...question,
      prediction: { type: 'content', content: text },
      stream: true,
      stream_options: { include_usage: true },
    });
    const chunks = await collect(streamed);
    expectUse(chunks.at(-1)!.usage, chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join(''));
  });

  it('counts none of what a stop string cuts off', async () => {
    const text = await textOf(question);
    const { usage } = await predicted(text, { stop: text.slice(20, 30) });
    const { accepted_prediction_tokens } = usage!.completion_tokens_details!;
    expect(accepted_prediction_tokens).toBeGreaterThan(0);
    expect(accepted_prediction_tokens).toBeLessThanOrEqual(usage!.completion_tokens);
  });

  it('is not spoken of in the usage of an answer without one', async () => {
    const { usage } = await predicted('', { max_tokens: 4 });
    expect(usage).not.toHaveProperty('completion_tokens_details');
  });

  it('keeps its form', async () => {
    const steps = Object.fromEntries(Array.from({ length: 8 }, (_, i) => [`step_${i}`, 'done']));
    const schema = {
      type: 'object',
      properties: Object.fromEntries(Object.keys(steps).map((name) => [name, { enum: ['done', 'open'] }])),
      required: Object.keys(steps),
      additionalProperties: false,
    };
    const made = (content: string) =>
      predicted(content, {
        messages: [{ role: 'user', content: `Repeat this JSON: ${JSON.stringify(steps)}` }],
        response_format: { type: 'json_schema', json_schema: { name: 'steps', strict: true, schema } },
        max_tokens: 200,
      });
    const whole = (await made('')).choices[0]!.message.content!;
    const again = await made(whole);
    expect(JSON.parse(again.choices[0]!.message.content!)).toEqual(JSON.parse(whole));
    expect(again.usage!.completion_tokens_details!.accepted_prediction_tokens).toBeGreaterThan(20);
    // What is predicted breaks the form.
    const kept = await made(whole.replaceAll('done', 'gone'));
    expect(Object.values(JSON.parse(kept.choices[0]!.message.content!))).not.toContain('gone');
  });

  it('is refused where the prediction is longer than any answer', async () => {
    const long = predicted('word '.repeat(9000));
    await expect(long).rejects.toMatchObject({
      status: 400,
      code: 'context_length_exceeded',
      param: 'prediction',
      message: expect.stringContaining('the prediction has'),
    });
  });
});

describe('prompt lookup', () => {
  it('predicts an answer that repeats what stands in its prompt, and says so in the metrics alone', async () => {
    await using stack = new AsyncDisposableStack();
    const looking = stack.adopt(await startReal({ promptLookup: true }), (backend) => backend.close());
    const text =
      'The boats come back at four in the morning, and the gulls follow them in a loud white cloud.';
    const request = ask(`Repeat this text, word for word:\n\n${text}`, { max_tokens: 40 });
    const { choices, usage } = await clientOf(looking).chat.completions.create(request);
    // Near ties may go the other way, since the rows of attention are summed in another order.
    expect(choices[0]!.message.content!.slice(0, 30)).toBe((await textOf(request)).slice(0, 30));
    expect(usage).not.toHaveProperty('completion_tokens_details');
    const lookedUp = (kind: string) =>
      gauge(`maskroute_tokens_total\\{.*kind="lookup_${kind}".*\\}`, looking);
    expect(await lookedUp('accepted')).toBeGreaterThan(8);
    expect(await lookedUp('rejected')).toBeLessThan(await lookedUp('accepted'));
  });
});

describe('log-probabilities', () => {
  it('spell out the text, and the greedy token is the likeliest', async () => {
    const { choices } = await client.chat.completions.create(
      ask('Write an emoji of a dog, then one of a cat.', {
        logprobs: true,
        top_logprobs: 3,
        max_tokens: 24,
      }),
    );
    const content = choices[0]!.logprobs!.content!;
    const bytes = Buffer.from(content.flatMap((token) => token.bytes ?? []));
    expect(bytes.toString('utf8')).toBe(choices[0]!.message.content);
    for (const { token, logprob, top_logprobs } of content) {
      expect(top_logprobs[0]).toMatchObject({ token, logprob });
      expect(top_logprobs.map((top) => top.logprob)).toEqual(
        top_logprobs.map((top) => top.logprob).toSorted((a, b) => b - a),
      );
    }
  });

  it('are the same when an answer is scored as a prompt, by text and by token ids', async () => {
    const request = { model: DEFAULT_MODEL, temperature: 0, logprobs: 1 };
    const prompt =
      'The naïve 👋🏽 traveller was asked for the capital of France. He said that the capital is';
    const said = (await client.completions.create({ ...request, prompt, max_tokens: 8 })).choices[0]!;
    const { folder, manifest } = await installedModel();
    const ids = [...(await openModelText(folder, manifest)).encodePrompt(prompt + said.text)];
    const score = { ...request, max_tokens: 0, echo: true };
    const byText = (await client.completions.create({ ...score, prompt: prompt + said.text })).choices[0]!;
    const byIds = (await client.completions.create({ ...score, prompt: ids })).choices[0]!;
    expect(byText.text).toBe(prompt + said.text);
    expect(byIds).toEqual(byText);

    const logprobs = byText.logprobs!;
    const generated = said.logprobs!.token_logprobs!;
    expect(logprobs.tokens!.slice(-generated.length)).toEqual(said.logprobs!.tokens);
    const again = logprobs.token_logprobs!.slice(-generated.length);
    // 8-bit products of one row and of many rows round differently: 0.12 at most was seen, 0 with fp32 weights.
    for (const [index, value] of generated.entries()) {
      expect(Math.abs(again[index]! - value)).toBeLessThan(0.3);
    }
    // Every offset points at its token in the text; a token of half a character has no text of its own.
    const whole = logprobs.tokens!.map((token, index) => ({ token, offset: logprobs.text_offset![index]! }));
    expect(whole.some(({ token }) => token.startsWith('bytes:'))).toBe(true);
    const characters = [...byText.text];
    for (const { token, offset } of whole.filter(({ token }) => !token.startsWith('bytes:'))) {
      expect(characters.slice(offset).join('').startsWith(token)).toBe(true);
    }
  });
});

describe('masks', () => {
  const mask = maskFromSkippedLayers(60, { skipAttention: [10, 20], skipFfn: [12, 15, 18] });

  it('by id come from the edge that the token names, and act as when written out', async () => {
    const id = maskId(hash, mask);
    const asked: string[] = [];
    const edge = createServer((request, response) => {
      asked.push(`${request.url} ${request.headers.authorization}`);
      response.end(JSON.stringify({ id, modelHash: hash, blockCount: 60, bits: maskBits(mask) }));
    });
    await new Promise<void>((resolve) => edge.listen(0, '127.0.0.1', resolve));
    const now_s = Math.floor(Date.now() / 1000);
    const token = await signToken(await importTokenKey(BACKEND_KEY), {
      tenant: 'acme',
      issuedAt_s: now_s,
      expiresAt_s: now_s + 60,
      nonce: 'nonce-0001',
      edge: `http://127.0.0.1:${(edge.address() as AddressInfo).port}`,
    });
    const viaEdge = new OpenAI({ baseURL: `${backend.url}/v1`, apiKey: token, maxRetries: 0 });
    const question = 'Explain why the sky is blue.';
    const byId = await viaEdge.chat.completions.create(ask(question, { mask: id })).withResponse();
    edge.close();
    expect(asked).toEqual([expect.stringMatching(`^/internal/v1/masks/${id} Bearer eyJ`)]);
    expect(byId.response.headers.get('x-maskroute-mask')).toBe(id);
    expect(Number(byId.response.headers.get('x-maskroute-sparsity'))).toBeCloseTo(sparsity(mask));
    const masked = byId.data.choices[0]!.message.content;
    const inline = { skipAttention: [10, 20], skipFfn: [12, 15, 18] };
    expect(await textOf(ask(question, { mask: inline }))).toBe(masked);
    expect(await textOf(ask(question, { mask: inline, kv: 'elide' }))).not.toBe('');
    expect(await textOf(ask(question))).not.toBe(masked);
    // Known by now, with the edge gone and a caller without one.
    expect(await textOf(ask(question, { mask: id }))).toBe(masked);
  });
});

describe('a conversation', () => {
  type Messages = OpenAI.ChatCompletionMessageParam[];
  const long = `Read this list. ${Array.from({ length: 18 }, (_, i) => `Item ${i} weighs ${(i * 7) % 90} grams.`).join(' ')}`;
  const asked = (tenant: string, nonce: string) => async (messages: Messages) => {
    const now_s = Math.floor(Date.now() / 1000);
    const apiKey = await signToken(await importTokenKey(BACKEND_KEY), {
      tenant,
      issuedAt_s: now_s,
      expiresAt_s: now_s + 60,
      nonce: `${nonce}-${messages.length}`,
      edge: '',
    });
    const by = new OpenAI({ baseURL: `${backend.url}/v1`, apiKey, maxRetries: 0 });
    const { choices, usage } = await by.chat.completions.create({ ...ask(''), messages });
    return { text: choices[0]!.message.content!, cached: usage!.prompt_tokens_details!.cached_tokens! };
  };

  it('has its beginning computed once, for its own tenant alone', async () => {
    const messages: Messages = [{ role: 'user', content: long }];
    const first = await asked('acme', 'first-acme')(messages);
    expect(first.cached).toBe(0);
    messages.push(
      { role: 'assistant', content: first.text },
      { role: 'user', content: 'Which is heaviest?' },
    );
    const [own, other] = [
      await asked('acme', 'second-acme')(messages),
      await asked('other', 'second-other')(messages),
    ];
    expect(own.cached).toBeGreaterThanOrEqual(192);
    expect(own.cached % 16).toBe(0);
    expect(other).toEqual({ text: own.text, cached: 0 });
  });
});

describe('surrogates', () => {
  const layers = { skipAttention: [10, 20, 24, 26], skipFfn: [12, 15, 18, 20] };
  const text =
    'The lighthouse keeper counted the ships that passed each night and wrote their names in a long book.';
  /** Mean log-probability of the text's tokens. */
  const score = async (mask: object | string) => {
    const { choices } = await client.completions.create({
      model: DEFAULT_MODEL,
      prompt: text,
      echo: true,
      max_tokens: 0,
      logprobs: 0,
      mask,
    } as never);
    const found = choices[0]!.logprobs!.token_logprobs!.slice(1) as number[];
    return found.reduce((sum, value) => sum + value, 0) / found.length;
  };

  it('are named by the model list, and stand in where a request says so', async () => {
    const [model] = (await client.models.list()).data as unknown as { maskroute: { surrogates: string } }[];
    const table = (await installedModel()).manifest.surrogates!.id;
    expect(model!.maskroute.surrogates).toBe(table);
    const [dense, holes, replaced] = [
      await score('dense'),
      await score(layers),
      await score({ ...layers, surrogate: true }),
    ];
    // Holes lose several times what surrogates do.
    expect(dense - replaced).toBeLessThan((dense - holes) / 2);
    const asked = ask('Say hi.', { mask: { ...layers, surrogate: true } });
    const { response } = await client.chat.completions.create(asked).withResponse();
    const mask = withSurrogates(maskFromSkippedLayers(60, layers), table as SurrogatesId);
    expect(response.headers.get('x-maskroute-mask')).toBe(maskId(hash, mask));
  });

  it('of another table than the model has are refused, so that the edge goes dense', async () => {
    const other = `s_${'0'.repeat(24)}` as SurrogatesId;
    const mask = withSurrogates(maskFromSkippedLayers(60, layers), other);
    const id = maskId(hash, mask);
    await mkdir(join(home, 'masks'), { recursive: true });
    const record = { id, modelHash: hash, blockCount: 60, bits: maskBits(mask), surrogates: other };
    await writeFile(join(home, 'masks', `${id}.json`), JSON.stringify(record));
    await expect(textOf(ask('Say hi.', { mask: id }))).rejects.toMatchObject({
      status: 400,
      code: 'surrogates_mismatch',
      param: 'mask',
    });
  });
});

describe('clients that leave', () => {
  const STEPS = 'maskroute_engine_steps';
  const left = () => eventually(async () => (await gauge('num_requests_running')) === 0);
  const words = (count: number) => Array.from({ length: count }, (_, i) => `word${i % 97}`).join(' ');

  it('free the engine in the middle of an answer', async () => {
    const stream = await client.chat.completions.create({
      ...ask('Write a long story.', { max_tokens: 4000, ignore_eos: true }),
      stream: true,
    });
    for await (const _ of stream) break;
    await left();
    const tokens = await gauge('maskroute_engine_generated_tokens');
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(await gauge('maskroute_engine_generated_tokens')).toBe(tokens);
  });

  it('free the engine before the first token of a long prompt', async () => {
    const leave = new AbortController();
    const pending = client.chat.completions
      .create({ ...ask(words(1800)), stream: true }, { signal: leave.signal })
      .catch((error: unknown) => error);
    await eventually(async () => (await gauge('num_requests_running')) === 1);
    const tokens = await gauge('maskroute_engine_prompt_tokens');
    leave.abort();
    await left();
    expect(await pending).toBeInstanceOf(OpenAI.APIUserAbortError);
    // A prompt is counted once all of it is computed.
    expect(await gauge('maskroute_engine_prompt_tokens')).toBe(tokens);
  });

  it('do not exist for prompts of 100,000 tokens: those are refused at once', async () => {
    const steps = await gauge(STEPS);
    const error = await textOf(ask(words(50_000))).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ code: 'context_length_exceeded', status: 400 });
    expect(await gauge(STEPS)).toBe(steps);
  });
});
