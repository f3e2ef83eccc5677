/** Grammars in their threads: who waits for whom, what is kept, and what becomes of a grammar that breaks its thread. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { SequenceGrammar } from '../../../gpu-backend/engine/grammar.ts';
import { schemaGrammar } from '../../../gpu-backend/grammar/json-schema.ts';
import type { GrammarSpec } from '../../../gpu-backend/grammar/xgrammar.ts';
import { PLAIN_FORMAT } from '../../../gpu-backend/model/tokenizer/tool-format.ts';
import { type GrammarPlayer, openGrammarPlayer } from '../../support/grammar-player.ts';

const form = (answer: string): GrammarSpec => ({ answer, calls: undefined });
const call = (tenant = 'a', signal = new AbortController().signal) => ({ tenant, signal, param: 'schema' });

let player: GrammarPlayer;
beforeAll(async () => {
  player = await openGrammarPlayer({ waitingOfOneMax: 2 });
}, 60_000);
afterAll(async () => {
  await player[Symbol.asyncDispose]();
});

/** Tokens that may follow, the end among them. */
function allowed(grammar: SequenceGrammar): number[] {
  const logits = new Float32Array(player.vocabularySize);
  grammar.restrict(logits, [player.endTokenId]);
  return [...logits.keys()].filter((id) => logits[id] === 0);
}
const follow = (grammar: SequenceGrammar, text: string) => {
  for (const id of player.text.tokenizer.encode(text, { addSpecial: false })) {
    expect(allowed(grammar), text).toContain(id);
    grammar.accept(id);
  }
};

describe('an answer', () => {
  test('ends where its grammar does, and not before', async () => {
    const open = await player.grammars.open(
      await player.grammars.prepare(form('root ::= "ab" [0-9]'), call()),
      call(),
    );
    const grammar = new SequenceGrammar(open.session);
    follow(grammar, 'ab');
    expect(grammar.isOver([])).toBe(false);
    expect(allowed(grammar)).not.toContain(player.endTokenId);
    follow(grammar, '7');
    expect(grammar.isOver([])).toBe(true);
    expect(allowed(grammar)).toEqual([player.endTokenId]);
    open.close();
  });

  test('keeps its place beside others of the same grammar', async () => {
    const prepared = await player.grammars.prepare(form('root ::= ("a" | "b") "c"'), call());
    const opened = await Promise.all([
      player.grammars.open(prepared, call()),
      player.grammars.open(prepared, call()),
    ]);
    const [one, other] = opened.map(({ session }) => new SequenceGrammar(session));
    follow(one!, 'a');
    follow(other!, 'bc');
    follow(one!, 'c');
    expect([one!.isOver([]), other!.isOver([])]).toEqual([true, true]);
    for (const { close } of opened) close();
  });

  test('fails alone when a token comes that may not follow', async () => {
    const open = await player.grammars.open(
      await player.grammars.prepare(form('root ::= "ab"'), call()),
      call(),
    );
    const grammar = new SequenceGrammar(open.session);
    grammar.accept(player.text.tokenizer.encode('x', { addSpecial: false })[0]!);
    expect(() => grammar.isOver([])).toThrowError(expect.objectContaining({ code: 'engine_failed' }));
    open.close();
  });
});

describe('the engine waits for no answer', () => {
  /** How long it stands still, in ms. */
  const stillFor_ms = (grammar: SequenceGrammar): number => {
    const before_ms = performance.now();
    expect(() => grammar.mayEnd).toThrowError(expect.objectContaining({ code: 'engine_failed' }));
    return performance.now() - before_ms;
  };
  const letter = () => player.text.tokenizer.encode('a', { addSpecial: false })[0]!;

  test('that was closed while a step of it ran', async () => {
    const open = await player.grammars.open(
      await player.grammars.prepare(form('root ::= "a"*'), call()),
      call(),
    );
    const grammar = new SequenceGrammar(open.session);
    open.close();
    // The thread closes one after the other.
    (
      await player.grammars.open(await player.grammars.prepare(form('root ::= "a"*'), call()), call())
    ).close();
    grammar.accept(letter());
    expect(stillFor_ms(grammar)).toBeLessThan(1000);
  });

  test('ends when a token takes too long, and others go on', async () => {
    const open = async (root: string) =>
      player.grammars.open(await player.grammars.prepare(form(`root ::= ${root}`), call()), call());
    const [many, other] = [await open('((([a-z]*)* [a-z]*)* [a-z]*)*'), await open('[a-z]*')];
    const [slow, quick] = [new SequenceGrammar(many.session), new SequenceGrammar(other.session)];
    const text = 'the quick brown fox jumps over the lazy dog '.repeat(9).replaceAll(' ', '');
    expect(() => follow(slow, text)).toThrow(expect.objectContaining({ code: 'invalid_schema' }));
    follow(quick, text);
    many.close();
    other.close();
  });

  test('of counted words, whose tokens are quick', { timeout: 60_000 }, async () => {
    const schema = { type: 'string', pattern: '^([a-z]{1,20} ?){9}$' };
    const spec = form(schemaGrammar(schema, { strict: true, param: 'schema' }));
    const open = await player.grammars.open(await player.grammars.prepare(spec, call()), call());
    const text = '"thequickbrownfoxjumps overthelazydog thequickbrown foxjumps over the lazy dogs"';
    const grammar = new SequenceGrammar(open.session);
    follow(grammar, text);
    expect(grammar.isOver([])).toBe(true);
    open.close();
  });

  test('of a loop that is counted from two on, behind which a part of exact length may begin anywhere', async () => {
    const schema = { type: 'string', pattern: '^\\w+a{2,}[ab]{12}a$' };
    const spec = form(schemaGrammar(schema, { strict: true, param: 'schema' }));
    const open = await player.grammars.open(await player.grammars.prepare(spec, call()), call());
    const grammar = new SequenceGrammar(open.session);
    follow(grammar, '"oneaaababababababba"');
    expect(grammar.isOver([])).toBe(true);
    open.close();
  });

  test('whose thread is gone', async () => {
    await using own = await openGrammarPlayer({});
    const open = await own.grammars.open(await own.grammars.prepare(form('root ::= "a"*'), call()), call());
    const grammar = new SequenceGrammar(open.session);
    await own.grammars.close();
    grammar.accept(letter());
    expect(stillFor_ms(grammar)).toBeLessThan(1000);
  });
});

describe('calls', () => {
  const argumentsGrammar = schemaGrammar(
    { type: 'object', properties: { a: { type: 'integer' } }, required: ['a'] },
    { strict: false, param: 'tools' },
  );
  const { begin, middle, end, trigger, separator } = PLAIN_FORMAT;
  const spec = (isRequired: boolean, isSingle: boolean, answer?: string): GrammarSpec => ({
    answer,
    calls: {
      tools: [{ begin: `${begin}add${middle}`, argumentsGrammar, end }],
      trigger,
      separator,
      isRequired,
      isSingle,
    },
  });
  const written = `${begin}add${middle}{"a": 12}${end}`;
  const after = async (given: GrammarSpec, text: string) => {
    const open = await player.grammars.open(await player.grammars.prepare(given, call()), call());
    const grammar = new SequenceGrammar(open.session);
    follow(grammar, text);
    const found = allowed(grammar);
    open.close();
    return { mayEnd: found.includes(player.endTokenId), count: found.length };
  };

  test('may come in any text, keep their form once they begin, and may come again', async () => {
    expect(await after(spec(false, false), '')).toMatchObject({ mayEnd: true });
    expect((await after(spec(false, false), 'Let me see. ')).count).toBeGreaterThan(10_000);
    expect(await after(spec(false, false), `${begin}add${middle}{"a": `)).toMatchObject({ mayEnd: false });
    expect((await after(spec(false, false), `${begin}add${middle}{"a": `)).count).toBeLessThan(100);
    expect(await after(spec(false, false), `Let me see. ${written}\n${written}`)).toMatchObject({
      mayEnd: true,
    });
  });

  test('must come where they are required, once where they are single', async () => {
    expect(await after(spec(true, false), '')).toMatchObject({ mayEnd: false });
    expect((await after(spec(true, false), written)).count).toBeGreaterThan(1);
    expect(await after(spec(true, true), written)).toEqual({ mayEnd: true, count: 1 });
    expect(await after(spec(false, true), `Yes. ${written}`)).toEqual({ mayEnd: true, count: 1 });
  });

  test('stand beside an answer of a form', async () => {
    const given = spec(false, true, schemaGrammar({ enum: [{ b: 1 }] }, { strict: true, param: 'schema' }));
    expect(await after(given, '{"b":1}')).toEqual({ mayEnd: true, count: 1 });
    expect(await after(given, written)).toEqual({ mayEnd: true, count: 1 });
  });
});

describe('a new grammar', () => {
  test('that the library cannot read is refused, and others go on', async () => {
    const open = await player.grammars.open(
      await player.grammars.prepare(form('root ::= [a-c]'), call()),
      call(),
    );
    await expect(player.grammars.prepare(form('root ::= ('), call())).rejects.toMatchObject({
      code: 'invalid_schema',
      param: 'schema',
    });
    expect(player.errors.at(-1)).toContain('a grammar could not be compiled');
    follow(new SequenceGrammar(open.session), 'b');
    expect((await player.play(form('root ::= "xyz"'), 1)).text).toBe('xyz');
    open.close();
  });

  test('that the shared thread alone cannot compile is no fault of the schema, and later answers get a new thread', async () => {
    const open = async () =>
      player.grammars.open(await player.grammars.prepare(form('root ::= "ab"'), call()), call());
    const before = await open();
    const running = new SequenceGrammar(before.session);
    follow(running, 'a');
    let reads = 0;
    // Read for its key, for the thread that tries it, and for the shared one.
    const spec: GrammarSpec = {
      get answer() {
        return ++reads < 3 ? 'root ::= "once"' : 'root ::= (';
      },
      calls: undefined,
    };
    await expect(player.grammars.prepare(spec, call())).rejects.toMatchObject({ code: 'engine_failed' });
    expect(player.errors.at(-1)).toContain('could not be compiled again');
    const after = await open();
    expect(after.session.bell).not.toBe(before.session.bell);
    follow(new SequenceGrammar(after.session), 'ab');
    follow(running, 'b');
    before.close();
    after.close();
    expect((await player.play(form('root ::= "after"'), 1)).text).toBe('after');
  });

  test('that compiles in the shared thread while an answer fails there is compiled all the same', async () => {
    const known = await player.grammars.prepare(form('root ::= "known"'), call());
    const broken = { ...known, spec: form((() => {}) as never) };
    let [reads, failing] = [0, Promise.resolve<unknown>(undefined)];
    const spec: GrammarSpec = {
      get answer() {
        // Read for its key, for the thread that tries it, and for the shared one.
        if (++reads === 3) failing = expect(player.grammars.open(broken, call())).rejects.toThrow();
        // Its compilation takes longer than a thread takes to end.
        return 'root ::= "whole" [a-z]{0,4}';
      },
      calls: undefined,
    };
    const open = await player.grammars.open(await player.grammars.prepare(spec, call()), call());
    expect(reads).toBeGreaterThanOrEqual(3);
    await failing;
    follow(new SequenceGrammar(open.session), 'whole');
    open.close();
  });

  test('is not refused because the machine had no time for it', async () => {
    await using late = await openGrammarPlayer({ compile_ms: 500 });
    let reads = 0;
    const spec: GrammarSpec = {
      get answer() {
        // Read for its key, and for the thread that tries it, whose time runs already.
        if (++reads === 2) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
        return 'root ::= "late"';
      },
      calls: undefined,
    };
    await expect(late.grammars.prepare(spec, call())).resolves.toMatchObject({ key: expect.any(String) });
    expect(reads).toBeGreaterThanOrEqual(2);
  });

  test('waits in a line in which a tenant has so many places', async () => {
    const wanted = [1, 2, 3, 4].map((i) => player.grammars.prepare(form(`root ::= "w${i}"`), call('crowd')));
    const other = player.grammars.prepare(form('root ::= "v"'), call('other'));
    const outcomes = await Promise.allSettled(wanted);
    // The first does not wait.
    expect(outcomes.map(({ status }) => status).join(' ')).toBe('fulfilled fulfilled fulfilled rejected');
    expect((outcomes[3] as PromiseRejectedResult).reason).toMatchObject({ code: 'queue_full' });
    await expect(other).resolves.toMatchObject({ key: expect.any(String) });
  });

  test('does not wait for one of another tenant that takes long, and a tenant has one compiled at a time', async () => {
    await using busy = await openGrammarPlayer({ trialsMax: 3 });
    const ended: string[] = [];
    const compile = (tenant: string, name: string, rest: string) =>
      busy.grammars.prepare(form(`root ::= "${name}" ${rest}`), call(tenant)).then(() => ended.push(name));
    // A thread is open then.
    await compile('crowd', 'before', '[0-9]');
    await Promise.all([
      compile('crowd', 'long', '[^"]{0,60}'),
      compile('crowd', 'after', '[0-9]'),
      compile('other', 'quick', '[0-9]'),
    ]);
    expect(ended).toEqual(['before', 'quick', 'long', 'after']);
  });

  test('waits for one of each other tenant when its own turn has come late', async () => {
    await using single = await openGrammarPlayer({ trialsMax: 1 });
    const ended: string[] = [];
    const all = ['a1', 'a2', 'a3', 'b1', 'b2', 'c1'].map((name) =>
      single.grammars.prepare(form(`root ::= "${name}"`), call(name[0])).then(() => ended.push(name)),
    );
    await Promise.all(all);
    expect(ended).toEqual(['a1', 'b1', 'c1', 'a2', 'b2', 'a3']);
  });

  test('is not compiled for a client that has left before', async () => {
    await using own = await openGrammarPlayer({});
    const gone = call('a', AbortSignal.abort());
    await expect(own.grammars.prepare(form('root ::= ('), gone)).rejects.toMatchObject({ code: 'cancelled' });
    await own.grammars.prepare(form('root ::= "next"'), call());
    expect(own.errors).toEqual([]);
  });

  test('is dropped when its client leaves', async () => {
    const left = new AbortController();
    const waiting = player.grammars.prepare(form('root ::= "left"'), call('a', left.signal));
    left.abort();
    await expect(waiting).rejects.toMatchObject({ code: 'cancelled' });
  });

  test('gives its place to another of its tenant when its client leaves', async () => {
    const running = player.grammars.prepare(form('root ::= "running"'), call());
    const left = new AbortController();
    const leaving = [1, 2].map((i) =>
      player.grammars.prepare(form(`root ::= "gone${i}"`), call('crowd', left.signal)),
    );
    const gone = Promise.allSettled(leaving);
    left.abort();
    await gone;
    await expect(player.grammars.prepare(form('root ::= "next"'), call('crowd'))).resolves.toBeDefined();
    await running;
  });
});

test('a schema that cannot be compiled once more is refused under the field that it came in', async () => {
  await using slow = await openGrammarPlayer({ quick_ms: -1, slowMax: 1 });
  let reads = 0;
  // Read for its key, for its first thread, and for the next one.
  const spec: GrammarSpec = {
    get answer() {
      return ++reads < 3 ? 'root ::= "once"' : 'root ::= (';
    },
    calls: undefined,
  };
  const prepared = await slow.grammars.prepare(spec, { ...call(), param: 'tools' });
  await slow.play(form('root ::= "other"'), 1);
  const { tenant, signal } = call();
  await expect(slow.grammars.open(prepared, { tenant, signal })).rejects.toMatchObject({
    code: 'invalid_schema',
    param: 'tools',
  });
});

test('answers of one tenant leave room for slow grammars of others', async () => {
  await using slow = await openGrammarPlayer({ quick_ms: -1, slowMax: 2, slowOfOneMax: 1 });
  const { grammars } = slow;
  const [first, second] = [form('root ::= "first"'), form('root ::= "second"')];
  await grammars.open(await grammars.prepare(first, call('many')), call('many'));
  await expect(grammars.prepare(second, call('many'))).rejects.toMatchObject({ code: 'queue_full' });
  const other = await grammars.open(await grammars.prepare(second, call('other')), call('other'));
  // Its thread runs anyway.
  await expect(grammars.prepare(second, call('many'))).resolves.toBeDefined();
  other.close();
});

test('a tenant that has its share of slow grammars does not close those that others come back to', async () => {
  await using slow = await openGrammarPlayer({ quick_ms: -1, slowMax: 2, slowOfOneMax: 1 });
  const { grammars } = slow;
  const [first, second, third] = ['first', 'second', 'third'].map((word) => form(`root ::= "${word}"`));
  const others = await grammars.prepare(second!, call('other'));
  await grammars.open(await grammars.prepare(first!, call('many')), call('many'));
  await expect(grammars.prepare(third!, call('many'))).rejects.toMatchObject({ code: 'queue_full' });
  // What is known needs no turn: `open` rejects at once where it would have to compile.
  await expect(grammars.open(others, call('other', AbortSignal.abort()))).resolves.toBeDefined();
});

test('two answers that begin together do not both take the last place of their tenant', async () => {
  await using slow = await openGrammarPlayer({ quick_ms: -1, slowMax: 2, slowOfOneMax: 1 });
  const { grammars } = slow;
  const first = await grammars.prepare(form('root ::= "first"'), call());
  const second = await grammars.prepare(form('root ::= "second"'), call());
  const opened = await Promise.allSettled([grammars.open(first, call()), grammars.open(second, call())]);
  expect(opened.map(({ status }) => status)).toEqual(['fulfilled', 'rejected']);
});

test('a schema that is refused is not compiled again to be refused again', async () => {
  await using own = await openGrammarPlayer();
  const wrong = form('root ::= (');
  for (const param of ['schema', 'tools'])
    await expect(own.grammars.prepare(wrong, { ...call(), param })).rejects.toMatchObject({
      code: 'invalid_schema',
      param,
    });
  expect(own.errors).toHaveLength(1);
});

test('a grammar that took long and found no room is slow the next time, too, whoever has compiled it', async () => {
  const long = form('root ::= [^"]{0,60}');
  await using slow = await openGrammarPlayer({ quick_ms: 20, slowMax: 1 });
  const { grammars } = slow;
  const first = form('root ::= [^"]{0,50}');
  const open = await grammars.open(await grammars.prepare(first, call()), call());
  for (let i = 0; i < 2; i++)
    await expect(grammars.prepare(long, call())).rejects.toMatchObject({ code: 'queue_full' });
  open.close();
  const later = await grammars.open(await grammars.prepare(long, call()), call());
  await expect(grammars.prepare(first, call())).rejects.toMatchObject({ code: 'queue_full' });
  later.close();
});

test('a grammar that takes long has a thread of its own, and one that takes too long ends with it', {
  timeout: 60_000,
}, async () => {
  const slow = await openGrammarPlayer({ quick_ms: -1, slowMax: 1 });
  const first = await slow.grammars.prepare(form('root ::= "first"'), call());
  const open = await slow.grammars.open(first, call());
  await expect(slow.grammars.prepare(form('root ::= "second"'), call())).rejects.toMatchObject({
    code: 'queue_full',
  });
  open.close();
  expect((await slow.play(form('root ::= "second"'), 1)).text).toBe('second');
  expect((await slow.play(form('root ::= "first"'), 1)).text).toBe('first');
  await slow[Symbol.asyncDispose]();
  const hasty = await openGrammarPlayer({ compile_ms: 20 });
  await expect(hasty.grammars.prepare(form('root ::= [^"]{0,200}'), call())).rejects.toMatchObject({
    code: 'invalid_schema',
  });
  await hasty[Symbol.asyncDispose]();
});
