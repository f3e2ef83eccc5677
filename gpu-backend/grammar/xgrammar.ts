/**
 * The only file that knows `@mlc-ai/web-xgrammar`, xgrammar as WebAssembly, and the worker thread that runs it: compiles
 * grammars for one vocabulary and matches answers. After a failed assertion, a `RuntimeError`, the library's memory may be
 * corrupted, and the thread has to be replaced.
 */
import { createRequire } from 'node:module';
import { parentPort, workerData } from 'node:worker_threads';
import type * as library from '@mlc-ai/web-xgrammar';
import { LRUCache } from 'lru-cache';
import { FAILED, type GrammarSession, giveUp, HEADER, TOO_SLOW } from '../engine/grammar.ts';
import type { TokenTable } from '../model/tokenizer/token-bytes.ts';
import { oneAtATime } from '../one-at-a-time.ts';

/** The form of an answer, as plain data that can be sent between threads. At least one of the two is defined. */
export type GrammarSpec = {
  /** EBNF of an answer without tool calls; undefined: any text. */
  readonly answer: string | undefined;
  readonly calls: CallsSpec | undefined;
};

export type CallsSpec = {
  readonly tools: readonly {
    /** The text before the arguments, with the tool's name; it starts with `trigger`. */
    readonly begin: string;
    /** EBNF. */
    readonly argumentsGrammar: string;
    readonly end: string;
  }[];
  /** The text that starts a call. */
  readonly trigger: string;
  readonly separator: string;
  /** No text, and at least one call. */
  readonly isRequired: boolean;
  /** At most one call; always so with an `answer`, unless calls are required. */
  readonly isSingle: boolean;
};

export type Vocabulary = {
  readonly table: TokenTable;
  /** The width of the model's logits; the tokenizer may have fewer tokens. */
  readonly size: number;
  /** The token that marks the end of the text for the library. */
  readonly endTokenId: number;
};

type Library = typeof library;
/** Compiles grammars for one vocabulary. */
type Compiler = { readonly library: Library; readonly compiler: library.GrammarCompiler };

async function openCompiler({ table, size, endTokenId }: Vocabulary): Promise<Compiler> {
  const loaded = await load();
  const special = new Set([...table.specialIds, endTokenId]);
  const none = new Uint8Array(0);
  const tokens = Array.from({ length: table.ends.length - 1 }, (_, id) =>
    // The library never allows a token without bytes.
    special.has(id) ? none : table.bytes.slice(table.ends[id]!, table.ends[id + 1]!),
  );
  // The library's types say strings, but it stores bytes, and not every token is valid UTF-8.
  const names = tokens as unknown as string[];
  const info = await loaded.TokenizerInfo.createTokenizerInfo(names, 'raw', false, size, [endTokenId]);
  return { library: loaded, compiler: await loaded.GrammarCompiler.createGrammarCompiler(info, false) };
}

const compile = ({ compiler }: Compiler, spec: GrammarSpec): Promise<library.CompiledGrammar> =>
  compiler.compileStructuralTag(formatOf(spec));

/** The library's structural tag: text, calls within text, or calls alone. */
function formatOf({ answer, calls }: GrammarSpec): library.StructuralTagFormat {
  const form = (grammar: string): library.GrammarFormat => ({ type: 'grammar', grammar });
  if (calls === undefined) return form(answer!);
  const { trigger, separator, isRequired, isSingle } = calls;
  const tags = calls.tools.map(
    ({ begin, argumentsGrammar, end }): library.TagFormat => ({
      type: 'tag',
      begin,
      end,
      content: form(argumentsGrammar),
    }),
  );
  const only: library.TagsWithSeparatorFormat = {
    type: 'tags_with_separator',
    tags,
    separator,
    at_least_one: true,
    stop_after_first: isSingle,
  };
  if (isRequired) return only;
  // In an `or` the library does not support a list of calls, so with an `answer` there is at most one call.
  if (answer !== undefined) return { type: 'or', elements: [form(answer), ...tags] };
  return { type: 'triggered_tags', triggers: [trigger], tags, stop_after_first: isSingle };
}

/**
 * The package claims to be an ES module but is a script that needs `require` and `__filename` and exports to a global. It
 * gets these as globals, which affects only this thread.
 */
async function load(): Promise<Library> {
  const require = createRequire(import.meta.url);
  const filename = require.resolve('@mlc-ai/web-xgrammar');
  const globals = globalThis as { require?: unknown; __filename?: string; xgrammar?: Library };
  Object.assign(globals, { require, __filename: filename });
  await import('@mlc-ai/web-xgrammar');
  return globals.xgrammar!;
}

/*
 * The thread and its messages to and from the main thread. Tokens and allowed tokens go through memory that it shares with
 * the engine (`engine/grammar.ts`).
 */

export type GrammarThreadStart = { readonly vocabulary: Vocabulary; readonly bell: SharedArrayBuffer };

export type ToGrammarThread =
  | { readonly type: 'compile'; readonly id: number; readonly key: string; readonly spec: GrammarSpec }
  | {
      readonly type: 'open';
      readonly id: number;
      readonly key: string;
      readonly spec: GrammarSpec;
      readonly session: GrammarSession;
    }
  | { readonly type: 'close'; readonly id: number };

export type FromGrammarThread =
  | { readonly type: 'ready' }
  /** `took_ms`: CPU time of the compilation; 0 when the grammar was known. */
  | { readonly type: 'done'; readonly id: number; readonly took_ms: number }
  | { readonly type: 'failed'; readonly id: number; readonly detail: string };

/**
 * CPU time from which a token is slow, and what all slow tokens of an answer may take: the answers of the thread wait for each
 * other. Tokens of usual grammars take less than one, but any may take longer once, as where memory is short.
 */
const SLOW_TOKEN_ms = 250;
const SLOW_TOKENS_MAX_ms = 1000;

/** Most compiled grammars in memory; each takes up to some megabytes. */
const GRAMMARS_MAX = 32;

type Session = {
  readonly words: SharedArrayBuffer;
  readonly header: Int32Array;
  readonly bits: Int32Array;
  readonly matcher: library.GrammarMatcher;
  /** What its slow tokens have taken. */
  slow_ms: number;
};

class Sessions {
  readonly #compiler: Compiler;
  readonly #endTokenId: number;
  /** Matchers of a disposed grammar stay valid. */
  readonly #grammars = new LRUCache<string, library.CompiledGrammar>({
    max: GRAMMARS_MAX,
    dispose: (compiled) => compiled.dispose(),
  });
  readonly #open = new Map<number, Session>();

  constructor(compiler: Compiler, endTokenId: number) {
    this.#compiler = compiler;
    this.#endTokenId = endTokenId;
  }

  async compile(
    key: string,
    spec: GrammarSpec,
  ): Promise<{ compiled: library.CompiledGrammar; took_ms: number }> {
    const known = this.#grammars.get(key);
    if (known !== undefined) return { compiled: known, took_ms: 0 };
    const before = process.threadCpuUsage();
    const compiled = await compile(this.#compiler, spec);
    this.#grammars.set(key, compiled);
    const { user, system } = process.threadCpuUsage(before);
    return { compiled, took_ms: (user + system) / 1000 };
  }

  async open(id: number, key: string, spec: GrammarSpec, { words }: GrammarSession): Promise<number> {
    const { compiled, took_ms } = await this.compile(key, spec);
    const session: Session = {
      words,
      header: new Int32Array(words, 0, HEADER.words),
      bits: new Int32Array(words, HEADER.words * Int32Array.BYTES_PER_ELEMENT),
      matcher: await this.#compiler.library.GrammarMatcher.createGrammarMatcher(compiled),
      slow_ms: 0,
    };
    this.#open.set(id, session);
    await this.#tell(session, 0);
    return took_ms;
  }

  /** Closes a session. `giveUp`: the engine may still be waiting for it in a step. */
  close(id: number): void {
    const session = this.#open.get(id);
    if (session === undefined) return;
    this.#open.delete(id);
    session.matcher.dispose();
    giveUp(session.words);
  }

  /** Advances every session that has a new token. */
  async advance(): Promise<void> {
    for (const session of [...this.#open.values()]) {
      const { words, header, matcher } = session;
      const accepted = Atomics.load(header, HEADER.accepted);
      const matched = Atomics.load(header, HEADER.matched);
      if (matched === FAILED || matched === TOO_SLOW || matched === accepted) continue;
      const before = process.threadCpuUsage();
      try {
        if (!matcher.acceptToken(header[HEADER.token]!))
          throw new Error('the grammar does not allow the token');
        await this.#tell(session, accepted);
        const { user, system } = process.threadCpuUsage(before);
        const took_ms = (user + system) / 1000;
        if (took_ms >= SLOW_TOKEN_ms) session.slow_ms += took_ms;
        if (session.slow_ms > SLOW_TOKENS_MAX_ms) giveUp(words, TOO_SLOW);
      } catch {
        giveUp(words);
      }
    }
  }

  async #tell({ header, bits, matcher }: Session, accepted: number): Promise<void> {
    const allowed = await matcher.getNextTokenBitmask();
    const [word, bit] = [this.#endTokenId >> 5, 1 << (this.#endTokenId & 31)];
    header[HEADER.mayEnd] = (allowed[word]! & bit) === 0 ? 0 : 1;
    allowed[word]! &= ~bit;
    bits.set(allowed);
    Atomics.store(header, HEADER.matched, accepted);
    Atomics.notify(header, HEADER.matched);
  }
}

/** A small grammar with the usual constructs; compiling it warms the library up. */
const WARM_UP: GrammarSpec = {
  answer: 'root ::= "{\\"a\\": \\"" ([^"\\\\] | "\\\\" ["n])* "\\"}"',
  calls: undefined,
};

async function serve(port: NonNullable<typeof parentPort>): Promise<void> {
  const { vocabulary, bell } = workerData as GrammarThreadStart;
  const compiler = await openCompiler(vocabulary);
  (await compile(compiler, WARM_UP)).dispose();
  const sessions = new Sessions(compiler, vocabulary.endTokenId);
  const send = (message: FromGrammarThread): void => port.postMessage(message);
  // The library has one heap, so its operations run one after the other.
  const inTurn = oneAtATime();
  const answer = (id: number, work: () => Promise<number>): Promise<void> =>
    inTurn(() =>
      work().then(
        (took_ms) => send({ type: 'done', id, took_ms }),
        (error: Error) => send({ type: 'failed', id, detail: error?.stack ?? String(error) }),
      ),
    );
  port.on('message', (message: ToGrammarThread) => {
    switch (message.type) {
      case 'compile':
        return answer(message.id, async () => (await sessions.compile(message.key, message.spec)).took_ms);
      case 'open':
        return answer(message.id, () =>
          sessions.open(message.id, message.key, message.spec, message.session),
        );
      case 'close':
        return inTurn(() => sessions.close(message.id));
    }
  });
  send({ type: 'ready' });
  const rings = new Int32Array(bell);
  for (let heard = Atomics.load(rings, 0); ; ) {
    const waiting = Atomics.waitAsync(rings, 0, heard);
    if (waiting.async) await waiting.value;
    heard = Atomics.load(rings, 0);
    await inTurn(() => sessions.advance());
  }
}

if (import.meta.main) await serve(parentPort!);
