import { describe, expect, it } from 'vitest';
import type { RunningAnswer } from '../../../gpu-backend/api/answer.ts';
import {
  type ChoiceJob,
  computedTokens,
  notBegun,
  type Piece,
  runChoice,
  StopMatcher,
} from '../../../gpu-backend/api/choice.ts';
import type { TokenText } from '../../../gpu-backend/api/parts.ts';
import { wholeChoices } from '../../../gpu-backend/api/wire.ts';
import type { Engine } from '../../../gpu-backend/engine/engine.ts';
import { createTokenReader, tokenTable } from '../../../gpu-backend/model/tokenizer/token-bytes.ts';

function run(pieces: readonly string[], stops: readonly string[]) {
  const matcher = new StopMatcher(stops);
  let text = '';
  for (const piece of pieces) {
    const result = matcher.push(piece);
    text += result.text;
    if (result.stopped) return { text, stopped: true };
  }
  return { text: text + matcher.flush(), stopped: false };
}

describe('stop strings', () => {
  it('are found across pieces and never shown in part', () => {
    const matcher = new StopMatcher(['\n\nQ:']);
    expect(matcher.push('yes\n')).toEqual({ text: 'yes', stopped: false });
    expect(matcher.push('\n')).toEqual({ text: '', stopped: false });
    expect(matcher.push('Q')).toEqual({ text: '', stopped: false });
    expect(matcher.push(': next')).toEqual({ text: '', stopped: true });
  });

  it('let go of what turns out to be no stop string', () => {
    expect(run(['a<', 'b', '<', '/s', 'x'], ['</s>'])).toEqual({ text: 'a<b</sx', stopped: false });
  });

  it('end at the one that is complete first, whatever the order of the list', () => {
    expect(run(['abcd'], ['abcd', 'bc'])).toEqual({ text: 'a', stopped: true });
    expect(run(['abcd'], ['bc', 'abcd'])).toEqual({ text: 'a', stopped: true });
    expect(run(['xabc'], ['bc', 'abc'])).toEqual({ text: 'x', stopped: true });
  });

  it('give the same answer however the text is cut', () => {
    let seed = 7;
    const random = (below: number) => {
      seed = (seed * 1103515245 + 12345) % 2 ** 31;
      return seed % below;
    };
    const word = (length: number) => Array.from({ length }, () => 'ab'[random(2)]).join('');
    for (let round = 0; round < 2000; round++) {
      const text = word(12);
      const stops = Array.from({ length: 1 + random(3) }, () => word(1 + random(5)));
      const pieces: string[] = [];
      for (let at = 0; at < text.length; ) {
        const length = 1 + random(5);
        pieces.push(text.slice(at, at + length));
        at += length;
      }
      const naive = () => {
        for (let end = 1; end <= text.length; end++) {
          const found = stops.filter((stop) => text.slice(0, end).endsWith(stop));
          const longest = Math.max(0, ...found.map((stop) => stop.length));
          if (longest > 0) return { text: text.slice(0, end - longest), stopped: true };
        }
        return { text, stopped: false };
      };
      expect(run(pieces, stops), `${text} ${stops} ${pieces}`).toEqual(naive());
    }
  });
});

describe('a stop string', () => {
  it('ends what the engine computes and what is paid for, before the text in front of it is read', async () => {
    const decoder = { push: () => 'yes;', flush: () => '' };
    const tokens = { createDecoder: () => decoder } as unknown as TokenText;
    const signals: AbortSignal[] = [];
    let compute = () => {};
    async function* generate(_: unknown, signal: AbortSignal, onToken: () => void) {
      signals.push(signal);
      compute = onToken;
      for (let token = 0; token < 5; token++) onToken();
      for (let token = 0; token < 5; token++) yield { type: 'token', tokenId: token };
    }
    const engine = { generate } as unknown as Engine;
    const job = { index: 0, stops: [';'], request: { minTokens: 0 } } as unknown as ChoiceJob;
    const progress = notBegun();
    const events = runChoice(engine, tokens, job, progress, new AbortController().signal);
    expect(await events.next()).toMatchObject({ value: { text: 'yes' } });
    // The engine hears of it within a step.
    compute();
    expect(computedTokens(progress)).toBe(1);
    expect(signals.map(({ aborted }) => aborted)).toEqual([true]);
    await events.return();
  });
});

it('an engine that ends a request without a result has failed', async () => {
  async function* generate() {}
  const engine = { generate } as unknown as Engine;
  const tokens = { createDecoder: () => ({}) } as unknown as TokenText;
  const job = { index: 0, stops: [] } as unknown as ChoiceJob;
  const events = runChoice(engine, tokens, job, notBegun(), new AbortController().signal);
  await expect(events.next()).rejects.toMatchObject({ code: 'engine_failed' });
});

describe('an echoed prompt', () => {
  it('may have more tokens than a call may have arguments', async () => {
    const piece = { tokenId: 0, offset: 0, offset_codePoints: 0, logprob: null };
    const pieces = Array<typeof piece>(200_000).fill(piece);
    const events = [{ type: 'text', index: 0, text: '', pieces }];
    const running = { plan: { jobs: [{}] }, events } as unknown as RunningAnswer;
    expect((await wholeChoices(running))[0]!.pieces).toHaveLength(pieces.length);
  });

  const names = ['<s>', '\u2581', '\u2581Hello', '\u2581world', '\u2581Hé'];
  const json = {
    model: { vocab: Object.fromEntries(names.map((name, id) => [name, id])) },
    decoder: { type: 'Metaspace' },
  };
  const tokens = createTokenReader(tokenTable(json, [{ id: 0, content: '<s>', special: true }]));
  const offsets = async (echo: string, promptTokenIds: number[]) => {
    async function* generate() {
      yield { type: 'prompt', logprobs: promptTokenIds.map(() => null) };
      yield { type: 'finished', reason: 'length' };
    }
    const engine = { generate } as unknown as Engine;
    const request = { promptTokenIds, minTokens: 0 };
    const job = { index: 0, stops: [], echo, request } as unknown as ChoiceJob;
    const pieces: Piece[] = [];
    const { signal } = new AbortController();
    for await (const event of runChoice(engine, tokens as unknown as TokenText, job, notBegun(), signal)) {
      if (event.type === 'text') pieces.push(...event.pieces);
    }
    return pieces.map(({ offset }) => offset);
  };

  it('has its tokens where they stand in its text, without the BOS and the space that the tokenizer adds', async () => {
    expect(await offsets('Hello world world', [0, 2, 3, 3])).toEqual([0, 0, 5, 11]);
    expect(await offsets('Hé world', [4, 3])).toEqual([0, 2]);
    expect(await offsets(' Hello world', [1, 2, 3])).toEqual([0, 0, 6]);
    expect(await offsets(' Hello world', [2, 3])).toEqual([0, 6]);
    expect(await offsets('  Hello', [0, 1, 1, 2])).toEqual([0, 0, 0, 1]);
    // A tokenizer may add a token at the end, too.
    expect(await offsets('Hello', [0, 2, 0])).toEqual([0, 0, 5]);
  });
});
