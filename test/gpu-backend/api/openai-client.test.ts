/** The official client against the real server; the engine is scripted so that every token is known. */
import OpenAI from 'openai';
import { describe, expect, it } from 'vitest';
import { PLAIN_FORMAT } from '../../../gpu-backend/model/tokenizer/tool-format.ts';
import { maskFromSkippedLayers, maskId } from '../../../shared/mask/mask.ts';
import { collect, serveModel } from './harness.ts';
import type { Script } from './scripted-engine.ts';
import {
  bytesOf,
  END_TOKEN,
  MODEL_HASH,
  says,
  scriptedEngine,
  scriptedModel,
  USER_TOKEN,
} from './scripted-engine.ts';

async function start(script: Script) {
  const engine = scriptedEngine(script);
  const server = await serveModel(scriptedModel(engine));
  return {
    engine,
    server,
    client: server.client,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

const messages = [{ role: 'user' as const, content: 'Hi' }];

describe('chat completions', () => {
  it('answer whole, with usage, fingerprint and the mask', async () => {
    await using api = await start(says('Grüße 👋'));
    const { data, response } = await api.client.chat.completions
      .create({ model: 'scripted', messages }, { headers: { 'x-request-id': 'abc.1' } })
      .withResponse();
    expect(data.choices).toEqual([
      {
        index: 0,
        message: { role: 'assistant', content: 'Grüße 👋', refusal: null },
        logprobs: null,
        finish_reason: 'stop',
      },
    ]);
    expect(data.id).toBe('chatcmpl-abc.1');
    expect(data.object).toBe('chat.completion');
    expect(Math.abs(data.created - Date.now() / 1000)).toBeLessThan(5);
    expect(data.system_fingerprint).toBe('fp_abababababab_dense');
    expect(data.usage).toEqual({
      prompt_tokens: 3,
      completion_tokens: 12,
      total_tokens: 15,
      prompt_tokens_details: { cached_tokens: 0 },
    });
    expect(data).toMatchObject({
      maskroute: { mask: 'dense', sparsity: 0, queue_ms: 1, prefill_ms: 2, decode_ms: 3 },
    });
    expect(response.headers.get('x-request-id')).toBe('abc.1');
    expect(response.headers.get('x-maskroute-mask')).toBe('dense');
    expect(response.headers.get('x-maskroute-sparsity')).toBe('0');
    expect(response.headers.get('server-timing')).toBe('queue;dur=1, prefill;dur=2, decode;dur=3');
    expect([...api.engine.requests[0]!.promptTokenIds]).toEqual([USER_TOKEN, ...bytesOf('Hi')]);
    expect(api.engine.requests[0]!.maxTokens).toBe(512 - 3);
  });

  it('stream byte-exact text, then the finish, the usage and the mask in the last chunk', async () => {
    await using api = await start(says('añ👋z'));
    const stream = await api.client.chat.completions.create({
      model: 'scripted',
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    const chunks = await collect(stream);
    expect(chunks[0]!.choices[0]!.delta).toEqual({ role: 'assistant', content: '' });
    const contents = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? ''));
    expect(contents.filter((text) => text !== '')).toEqual(['a', 'ñ', '👋', 'z']);
    expect(chunks.at(-2)!.choices[0]).toMatchObject({ delta: {}, finish_reason: 'stop' });
    expect(chunks.slice(0, -1).every((chunk) => chunk.usage === null)).toBe(true);
    expect(chunks.at(-1)).toMatchObject({
      choices: [],
      usage: { prompt_tokens: 3, completion_tokens: 8, total_tokens: 11 },
      maskroute: { mask: 'dense', decode_ms: 3 },
    });
    expect(new Set(chunks.map((chunk) => chunk.id)).size).toBe(1);
  });

  it('give every choice its own index and seed', async () => {
    await using api = await start({
      answer: ({ sampling }) => [...bytesOf(`seed ${sampling.seed}`), END_TOKEN],
    });
    const whole = await api.client.chat.completions.create({ model: 'scripted', messages, n: 3, seed: 40 });
    expect(whole.choices.map(({ index, message }) => [index, message.content])).toEqual([
      [0, 'seed 40'],
      [1, 'seed 41'],
      [2, 'seed 42'],
    ]);
    expect(whole.usage).toMatchObject({ prompt_tokens: 3, completion_tokens: 21 });
    // Later choices wait as long as the first one in the queue, whenever they are submitted.
    const since = new Set(api.engine.requests.map(({ answerSince_ms }) => answerSince_ms));
    expect([...since]).toEqual([expect.any(Number)]);
    const stream = await api.client.chat.completions.create({
      model: 'scripted',
      messages,
      n: 3,
      seed: 40,
      stream: true,
    });
    const texts = ['', '', ''];
    const finished: string[] = [];
    for await (const chunk of stream) {
      for (const { index, delta, finish_reason } of chunk.choices) {
        texts[index] += delta.content ?? '';
        if (finish_reason) finished.push(`${index} ${finish_reason}`);
      }
    }
    expect(texts).toEqual(['seed 40', 'seed 41', 'seed 42']);
    expect(finished.toSorted()).toEqual(['0 stop', '1 stop', '2 stop']);
  });

  it.each([2 ** 53 - 1, 2 ** 63, -(2 ** 63), -1])(
    'take the seed %d, and draw every choice from another',
    async (seed) => {
      await using api = await start({
        answer: ({ sampling }) => [...bytesOf(`${sampling.seed}`), END_TOKEN],
      });
      const ask = async () => {
        const { choices } = await api.client.chat.completions.create({
          model: 'scripted',
          messages,
          n: 16,
          seed,
        });
        return choices.map(({ message }) => message.content);
      };
      const seeds = await ask();
      expect(new Set(seeds).size).toBe(16);
      expect(await ask()).toEqual(seeds);
    },
  );

  it('stop nowhere at an empty string', async () => {
    await using api = await start(says('abcd'));
    for (const stop of ['', [''], [], ['', 'd']]) {
      const { choices } = await api.client.chat.completions.create({ model: 'scripted', messages, stop });
      expect(choices[0]!.message.content).toBe(stop.includes('d') ? 'abc' : 'abcd');
    }
  });

  it('stop at a string that spans tokens, showing no part of it, and cancel the engine', async () => {
    await using api = await start({ answer: () => bytesOf('one\n\ntwo\n\nthree'), step_ms: 1 });
    for (const stream of [false, true]) {
      const request = { model: 'scripted', messages, stop: ['\n\nt', 'zzz'], max_tokens: 400 };
      let text = '';
      let reason: string | null = null;
      if (stream) {
        for await (const { choices } of await api.client.chat.completions.create({ ...request, stream })) {
          text += choices[0]!.delta.content ?? '';
          reason = choices[0]!.finish_reason;
        }
      } else {
        const { choices } = await api.client.chat.completions.create(request);
        text = choices[0]!.message.content!;
        reason = choices[0]!.finish_reason;
      }
      expect([text, reason]).toEqual(['one', 'stop']);
    }
    expect(api.engine.ended.map(({ reason, tokens }) => [reason, tokens])).toEqual([
      ['cancelled', 6],
      ['cancelled', 6],
    ]);
  });

  it('look for stop strings from the last of min_tokens on', async () => {
    await using api = await start(says('bbb'));
    const least = { min_tokens: 2 };
    const request = { model: 'scripted', messages, stop: 'b', ...least };
    const { choices } = await api.client.chat.completions.create(request);
    expect(choices[0]).toMatchObject({ message: { content: 'b' }, finish_reason: 'stop' });
  });

  it('return log-probabilities with bytes and alternatives', async () => {
    await using api = await start(says('hé'));
    const { choices } = await api.client.chat.completions.create({
      model: 'scripted',
      messages,
      logprobs: true,
      top_logprobs: 2,
    });
    expect(choices[0]!.logprobs).toHaveProperty('refusal', null);
    const content = choices[0]!.logprobs!.content!;
    expect(content.map(({ token, bytes, logprob }) => [token, bytes, logprob])).toEqual([
      ['h', [104], -1.04],
      ['\ufffd', [0xc3], -1.95],
      ['\ufffd', [0xa9], -1.69],
    ]);
    expect(content[0]!.top_logprobs).toEqual([
      { token: 'h', logprob: -1.04, bytes: [104] },
      { token: 'i', logprob: -2.04, bytes: [105] },
    ]);
    const streamed: unknown[] = [];
    for await (const chunk of await api.client.chat.completions.create({
      model: 'scripted',
      messages,
      logprobs: true,
      top_logprobs: 2,
      stream: true,
    })) {
      streamed.push(...(chunk.choices[0]!.logprobs?.content ?? []));
    }
    expect(streamed).toEqual(content);
  });

  it('show a template a developer as the system: few know the newer name', async () => {
    const shown: string[][] = [];
    const model = scriptedModel(scriptedEngine(says('ok')));
    const text: typeof model.text = {
      ...model.text,
      async encode(job, call) {
        if (job.type === 'chat') shown.push(job.messages.map(({ role }) => role));
        return await model.text.encode(job, call);
      },
    };
    await using server = await serveModel({ ...model, text });
    const developer = { role: 'developer' as const, content: 'Be brief.' };
    await server.client.chat.completions.create({ model: 'scripted', messages: [developer, ...messages] });
    await server.client.responses.create({ model: 'scripted', input: [developer, ...messages] });
    expect(shown).toEqual([
      ['system', 'user'],
      ['system', 'user'],
    ]);
  });

  it('end at the newer of two maxima, and at the end of the context', async () => {
    await using api = await start({ answer: () => [97] });
    const ask = async (fields: object) => {
      await api.client.chat.completions.create({ model: 'scripted', messages, ...fields });
      const { maxTokens, minTokens } = api.engine.requests.at(-1)!;
      return { maxTokens, minTokens };
    };
    expect(await ask({ max_completion_tokens: 2, max_tokens: 3 })).toEqual({ maxTokens: 2, minTokens: 0 });
    expect(await ask({ max_tokens: 3, min_tokens: 3 })).toEqual({ maxTokens: 3, minTokens: 3 });
    expect(await ask({ max_tokens: 9999 })).toEqual({ maxTokens: 509, minTokens: 0 });
    expect(await ask({ min_tokens: 9999 })).toEqual({ maxTokens: 509, minTokens: 509 });
  });

  it('take a top_k of -1, which is none at vLLM', async () => {
    await using api = await start(says('x'));
    const none = { top_k: -1 };
    await api.client.chat.completions.create({ model: 'scripted', messages, ...none });
    expect(api.engine.requests[0]!.sampling.topK).toBe(0);
  });

  it('that call a tool and say nothing have no content, whole and streamed', async () => {
    const { begin, middle, end } = PLAIN_FORMAT;
    const engine = scriptedEngine(says(`${begin}f${middle}{"a": 1}${end}`));
    const model = scriptedModel(engine);
    let open = 0;
    const grammars: typeof model.grammars = {
      prepare: (spec, call) => model.grammars.prepare(spec, call),
      close: async () => {},
      async open(grammar, call) {
        const opened = await model.grammars.open(grammar, call);
        open++;
        const close = () => {
          open--;
          opened.close();
        };
        return { ...opened, close };
      },
    };
    await using server = await serveModel({ ...model, grammars });
    const tools = [{ type: 'function' as const, function: { name: 'f' } }];
    const request = { model: 'scripted', messages, tools };
    const { choices } = await server.client.chat.completions.create(request);
    expect(choices[0]).toMatchObject({
      finish_reason: 'tool_calls',
      message: { content: null, tool_calls: [{ function: { name: 'f', arguments: '{"a": 1}' } }] },
    });
    const stream = await server.client.chat.completions.create({ ...request, stream: true });
    const deltas = (await collect(stream)).map((chunk) => chunk.choices[0]!.delta);
    expect(deltas[0]).toEqual({ role: 'assistant', content: null });
    const calls = deltas.flatMap(({ tool_calls }) => tool_calls ?? []);
    expect(calls[0]).toMatchObject({ index: 0, function: { name: 'f', arguments: '' } });
    expect(calls.map((call) => call.function?.arguments).join('')).toBe('{"a": 1}');
    expect(open).toBe(0);
  });

  it('hide special tokens in the text, and let ignore_eos and min_tokens past them', async () => {
    await using api = await start({ answer: () => [...bytesOf('a'), END_TOKEN, ...bytesOf('b')] });
    const { choices, usage } = await api.client.chat.completions.create({
      model: 'scripted',
      messages,
      max_tokens: 4,
      ...{ ignore_eos: true, min_tokens: 2 },
    });
    expect(choices[0]).toMatchObject({ message: { content: 'abb' }, finish_reason: 'length' });
    expect(usage!.completion_tokens).toBe(4);
    expect(api.engine.requests[0]).toMatchObject({ stopTokenIds: [], minTokens: 2, maxTokens: 4 });
  });

  it('pass sampling and masks to the engine, and echo the routing decision', async () => {
    await using api = await start(says('x'));
    const { data, response } = await api.client.chat.completions
      .create({
        model: 'scripted',
        messages,
        temperature: 0,
        top_p: 0.9,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: { 65: -100 },
        ...{ top_k: 5, min_p: 0.1, repetition_penalty: 1.1, stop_token_ids: [7, END_TOKEN], kv: 'elide' },
        ...{ mask: { skipAttention: [1], skipFfn: [0, 3] }, maskroute: { mask_set: 's', cluster: 4 } },
      })
      .withResponse();
    const mask = maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [0, 3] });
    const id = maskId(MODEL_HASH, mask);
    expect(api.engine.requests[0]).toMatchObject({
      sampling: {
        temperature: 0,
        topP: 0.9,
        topK: 5,
        minP: 0.1,
        presencePenalty: 0.5,
        frequencyPenalty: -0.5,
        repetitionPenalty: 1.1,
        logitBias: [[65, -100]],
        seed: undefined,
      },
      stopTokenIds: [END_TOKEN, 7],
      plan: { mask, kv: 'elide' },
    });
    expect(data).toMatchObject({ maskroute: { mask_set: 's', cluster: 4, mask: id, sparsity: 3 / 8 } });
    expect(response.headers.get('x-maskroute-mask')).toBe(id);
    expect(data.system_fingerprint).toBe(`fp_abababababab_${id}`);
  });

  it('hand back what an edge says of its decision, also one that knows more reasons than this backend', async () => {
    await using api = await start(says('x'));
    const decision = { mask_set: 's', cluster: null, fallback: 'a_reason_of_a_later_release' };
    const maskroute = { ...decision, completion: 'abc' };
    const body = { model: 'scripted', messages, mask: 'dense', maskroute };
    const response = await api.server.post('/v1/chat/completions', body);
    expect(response.status).toBe(200);
    const answer = await response.json();
    expect(answer).toMatchObject({ id: 'chatcmpl-abc', maskroute: decision });
    expect(answer.maskroute).not.toHaveProperty('completion');
  });
});

describe('completions', () => {
  it('take a list of prompts, in text or token ids, times n, in order', async () => {
    await using api = await start({
      answer: ({ promptTokenIds }) => [...[...promptTokenIds].toReversed(), END_TOKEN],
    });
    const { choices, usage } = await api.client.completions.create({
      model: 'scripted',
      prompt: ['ab', 'cde'],
      n: 2,
    });
    expect(choices.map(({ index, text }) => [index, text])).toEqual([
      [0, 'ba'],
      [1, 'ba'],
      [2, 'edc'],
      [3, 'edc'],
    ]);
    expect(usage).toMatchObject({ prompt_tokens: 5, completion_tokens: 10 });
    const ids = await api.client.completions.create({ model: 'scripted', prompt: [[97, 98], [99]] });
    expect(ids.choices.map(({ text }) => text)).toEqual(['ba', 'c']);
    const single = await api.client.completions.create({ model: 'scripted', prompt: [97, 98] });
    expect(single.choices.map(({ text }) => text)).toEqual(['ba']);
  });

  it('tell the longest wait of their choices, and the sums of what they took', async () => {
    await using api = await start({
      answer: ({ promptTokenIds }) => [...promptTokenIds, END_TOKEN],
      timings: (tokens) => ({
        queue_ms: tokens,
        prefill_ms: tokens / 10,
        decode_ms: 100 * tokens,
        stepGap_ms: 0,
      }),
    });
    const answer = await api.client.completions.create({ model: 'scripted', prompt: ['a', 'bc'] });
    expect(answer).toMatchObject({ maskroute: { queue_ms: 2, prefill_ms: 0.3, decode_ms: 300 } });
  });

  it('default to 16 tokens', async () => {
    await using api = await start({ answer: () => [97] });
    const { choices } = await api.client.completions.create({ model: 'scripted', prompt: 'x' });
    expect(choices[0]).toMatchObject({ text: 'a'.repeat(16), finish_reason: 'length' });
  });

  it('score a prompt: echo, logprobs and max_tokens 0', async () => {
    await using api = await start(says('never'));
    const request = {
      model: 'scripted',
      prompt: '<|user|>hé',
      parse_special: true,
      echo: true,
      logprobs: 1,
      max_tokens: 0,
    };
    const { choices, usage } = await api.client.completions.create(request);
    expect(choices[0]).toEqual({
      index: 0,
      text: '<|user|>hé',
      finish_reason: 'length',
      logprobs: {
        tokens: ['<|user|>', 'h', 'bytes:\\xc3', 'bytes:\\xa9'],
        token_logprobs: [null, -1.04, -1.95, -1.69],
        top_logprobs: [null, { h: -1.04 }, { 'bytes:\\xc3': -1.95 }, { 'bytes:\\xa9': -1.69 }],
        text_offset: [0, 8, 9, 9],
      },
    });
    expect(usage).toMatchObject({ prompt_tokens: 4, completion_tokens: 0 });
    expect(api.engine.requests[0]).toMatchObject({ maxTokens: 0, promptLogprobs: 1, logprobs: 1 });
  });

  it('take special tokens in a prompt for text, unless asked otherwise', async () => {
    await using api = await start(says('x'));
    const prompt = '<|user|>';
    await api.client.completions.create({ model: 'scripted', prompt });
    await api.client.completions.create({ model: 'scripted', prompt, ...{ parse_special: true } });
    const sent = api.engine.requests.map(({ promptTokenIds }) => [...promptTokenIds]);
    expect(sent).toEqual([bytesOf(prompt), [USER_TOKEN]]);
  });

  it('begin without the BOS token when asked to', async () => {
    const told: unknown[] = [];
    const model = scriptedModel(scriptedEngine(says('x')));
    const text: typeof model.text = {
      ...model.text,
      async encode(job, call) {
        if (job.type === 'prompts') told.push(job.addSpecial);
        return await model.text.encode(job, call);
      },
    };
    await using server = await serveModel({ ...model, text });
    for (const fields of [{}, { add_special_tokens: true }, { add_special_tokens: false }])
      await server.client.completions.create({ model: 'scripted', prompt: 'Hi', ...fields });
    expect(told).toEqual([true, true, false]);
  });

  it('name tokens by their text, also a byte order mark; of two with one name the likelier counts', async () => {
    const model = scriptedModel(scriptedEngine({ ...says('a'), logprob: (id) => (id === 97 ? -1 : -1 / 0) }));
    const names = ['\ufeff', 'b', 'b'];
    const tokenBytes = (id: number) =>
      id < END_TOKEN ? Uint8Array.from(bytesOf(names[id - 97]!)) : model.text.tokenBytes(id);
    await using server = await serveModel({ ...model, text: { ...model.text, tokenBytes } });
    const { client } = server;
    const { choices } = await client.completions.create({ model: 'scripted', prompt: 'x', logprobs: 3 });
    expect(choices[0]!.logprobs).toMatchObject({
      tokens: ['\ufeff', '<|end|>'],
      // JSON has no infinity.
      token_logprobs: [-1, -9999],
      top_logprobs: [{ '\ufeff': -1, b: -2 }, expect.anything()],
    });
    const asked = { model: 'scripted', messages, logprobs: true, top_logprobs: 1 };
    const chat = await client.chat.completions.create(asked);
    expect(chat.choices[0]!.logprobs!.content![0]).toMatchObject({ token: '\ufeff', bytes: [239, 187, 191] });
  });

  it('offsets of a text count characters, as Python does: an emoji is one', async () => {
    await using api = await start(says('😀d'));
    const request = { model: 'scripted', prompt: '😀b', echo: true, logprobs: 0 };
    const { choices } = await api.client.completions.create(request);
    expect(choices[0]!.logprobs!.text_offset).toEqual([0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 4]);
  });

  it('echo with generated tokens after the prompt, streaming and not', async () => {
    await using api = await start(says('cd'));
    const request = { model: 'scripted', prompt: 'ab', echo: true, logprobs: 0 };
    const { choices } = await api.client.completions.create(request);
    expect(choices[0]).toMatchObject({
      text: 'abcd',
      finish_reason: 'stop',
      logprobs: {
        // The token that ended it comes last, as lm-evaluation-harness counts on.
        tokens: ['a', 'b', 'c', 'd', '<|end|>'],
        token_logprobs: [null, -0.98, -0.99, -1, -2.56],
        text_offset: [0, 1, 2, 3, 4],
        top_logprobs: [null, { b: -0.98 }, { c: -0.99 }, { d: -1 }, { '<|end|>': -2.56 }],
      },
    });
    let text = '';
    const tokens: string[] = [];
    for await (const chunk of await api.client.completions.create({ ...request, stream: true })) {
      text += chunk.choices[0]!.text;
      tokens.push(...(chunk.choices[0]!.logprobs?.tokens ?? []));
    }
    expect([text, tokens]).toEqual(['abcd', ['a', 'b', 'c', 'd', '<|end|>']]);
    for (const prompt of ['ab', bytesOf('ab')]) {
      const plain = await api.client.completions.create({ model: 'scripted', prompt, echo: true });
      expect(plain.choices[0]).toMatchObject({ text: 'abcd', logprobs: null });
    }
  });

  it('keep log-probabilities of visible tokens only when a stop string cuts the text', async () => {
    await using api = await start({ answer: () => bytesOf('abSTOPcd') });
    const { choices, usage } = await api.client.completions.create({
      model: 'scripted',
      prompt: 'x',
      logprobs: 1,
      stop: 'STOP',
    });
    expect(choices[0]).toMatchObject({ text: 'ab', logprobs: { tokens: ['a', 'b'] }, finish_reason: 'stop' });
    expect(usage!.completion_tokens).toBe(6);
  });

  it('keep no log-probability of a character that the stop string takes, whose tokens came before', async () => {
    await using api = await start(says('añ👋'));
    const request = { model: 'scripted', messages, logprobs: true, stop: 'ñ👋' };
    const bytes: number[][] = [];
    for await (const { choices } of await api.client.chat.completions.create({ ...request, stream: true }))
      bytes.push(...(choices[0]!.logprobs?.content ?? []).map((token) => token.bytes!));
    expect(bytes).toEqual([[97]]);
    const { choices } = await api.client.chat.completions.create({ ...request, stop: null });
    expect(choices[0]!.logprobs!.content!.flatMap((token) => token.bytes!)).toEqual([...bytesOf('añ👋')]);
  });
});

describe('errors reach the client as its own exceptions', () => {
  it.each([
    [{ model: 'other' }, OpenAI.NotFoundError, 'model_not_found', 'model'],
    [{ model: 'scripted:dense', mask: { skipFfn: [1] } }, OpenAI.BadRequestError, 'invalid_request', 'mask'],
    [{ mask: 'm_0123456789abcdef01234567' }, OpenAI.BadRequestError, 'unknown_mask', 'mask'],
    [{ mask: { skipFfn: [4] } }, OpenAI.BadRequestError, 'invalid_request', 'mask'],
    [{ max_tokens: 0 }, OpenAI.BadRequestError, 'invalid_request', 'max_tokens'],
    [{ top_logprobs: 3 }, OpenAI.BadRequestError, 'invalid_request', 'top_logprobs'],
    [{ logit_bias: { 258: 1 } }, OpenAI.BadRequestError, 'invalid_request', 'logit_bias'],
    [{ min_tokens: 9, max_tokens: 3 }, OpenAI.BadRequestError, 'invalid_request', 'min_tokens'],
    [{ tools: [{ type: 'function' }] }, OpenAI.BadRequestError, 'invalid_request', 'tools[0].function'],
    [{ tool_choice: 'required' }, OpenAI.BadRequestError, 'invalid_request', 'tool_choice'],
    [{ function_call: { name: 'f' } }, OpenAI.BadRequestError, 'invalid_request', 'function_call'],
    [{ modalities: ['text', 'audio'] }, OpenAI.BadRequestError, 'invalid_request', 'modalities[1]'],
    [{ web_search_options: {} }, OpenAI.BadRequestError, 'invalid_request', 'web_search_options'],
    [
      { messages: [{ role: 'user', content: 'x'.repeat(600) }] },
      OpenAI.BadRequestError,
      'context_length_exceeded',
      'messages',
    ],
    [
      { messages: [{ role: 'user', content: 'x'.repeat(100_000) }] },
      OpenAI.BadRequestError,
      'context_length_exceeded',
      'messages',
    ],
  ] as const)('%j', async (fields, type, code, param) => {
    await using api = await start(says('x'));
    const request = { model: 'scripted', messages, ...(fields as object) };
    const error = await api.client.chat.completions.create(request).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(type);
    expect(error).toMatchObject({ code, param });
    expect(api.engine.requests).toEqual([]);
  });

  it('a prompt that is too long, in the words by which LiteLLM knows it', async () => {
    await using api = await start(says('x'));
    const request = { model: 'scripted', prompt: Array(600).fill(65) };
    await expect(api.client.completions.create(request)).rejects.toMatchObject({
      message: expect.stringContaining("This model's maximum context length is 512 tokens"),
    });
  });

  it('a wrong key', async () => {
    await using api = await start(says('x'));
    const stranger = new OpenAI({ baseURL: `${api.server.url}/v1`, apiKey: 'wrong', maxRetries: 0 });
    await expect(stranger.models.list()).rejects.toBeInstanceOf(OpenAI.AuthenticationError);
  });

  it('models: both names, and one by name', async () => {
    await using api = await start(says('x'));
    const { data } = await api.client.models.list();
    expect(data.map(({ id }) => id)).toEqual(['scripted', 'scripted:dense']);
    expect(await api.client.models.retrieve('scripted:dense')).toMatchObject({
      maskroute: { hash: MODEL_HASH, block_count: 8, context_tokens: 512, dense: true },
    });
    await expect(api.client.models.retrieve('other')).rejects.toMatchObject({ code: 'model_not_found' });
  });
});
