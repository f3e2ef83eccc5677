/**
 * The only file that knows `@mlc-ai/web-xgrammar`, xgrammar as WebAssembly, and the thread that it runs in. It compiles grammars
 * for one vocabulary and matches answers with them. A failed check inside it ends as a `RuntimeError`, after which its memory
 * cannot be trusted: then a new thread has to begin.
 */
import { createRequire } from 'node:module';
import { parentPort, workerData } from 'node:worker_threads';
import type * as library from '@mlc-ai/web-xgrammar';
import { LRUCache } from 'lru-cache';
import { FAILED, type GrammarSession, giveUp, HEADER } from '../engine/grammar.ts';
import type { TokenTable } from '../model/tokenizer/token-bytes.ts';

/** What an answer must look like, as plain data that goes from thread to thread. At least one of both is there. */
export type GrammarSpec = {
  /** The EBNF of the answer's text where it calls nothing; undefined: any text. */
  readonly answer: string | undefined;
  readonly calls: CallsSpec | undefined;
};

export type CallsSpec = {
  readonly tools: readonly {
    /** Stands before the arguments, the tool's name in it; it begins with `trigger`. */
    readonly begin: string;
    /** EBNF. */
    readonly argumentsGrammar: string;
    readonly end: string;
  }[];
  /** Where a call begins in a text. */
  readonly trigger: string;
  readonly separator: string;
  /** Calls only, and at least one. */
  readonly isRequired: boolean;
  /** One call at most; beside an `answer` it is that anyway, unless calls are required. */
  readonly isSingle: boolean;
};

/** Tokens that may follow, a bit each; they include `endTokenId` where the text may end. */
type Matcher = {
  /** Whether the token may follow. */
  accept(tokenId: number): boolean;
  allowed(): Promise<Int32Array>;
  close(): void;
};

type Compiled = { match(): Promise<Matcher>; close(): void };

export type Vocabulary = {
  readonly table: TokenTable;
  /** The width of the model's logits; there may be fewer tokens. */
  readonly size: number;
  /** Stands for the end of the text. */
  readonly endTokenId: number;
};

type Compiler = { compile(spec: GrammarSpec): Promise<Compiled> };

async function openCompiler({ table, size, endTokenId }: Vocabulary): Promise<Compiler> {
  const { GrammarCompiler, GrammarMatcher, TokenizerInfo } = await load();
  const special = new Set([...table.specialIds, endTokenId]);
  const none = new Uint8Array(0);
  const tokens = Array.from({ length: table.ends.length - 1 }, (_, id) =>
    // A token without bytes is special to the library, and never allowed.
    special.has(id) ? none : table.bytes.slice(table.ends[id]!, table.ends[id + 1]!),
  );
  // Its types say strings; bytes are what it keeps, and not every token is well-formed text.
  const info = await TokenizerInfo.createTokenizerInfo(tokens as unknown as string[], 'raw', false, size, [
    endTokenId,
  ]);
  const compiler = await GrammarCompiler.createGrammarCompiler(info, false);
  return {
    async compile(spec) {
      const compiled = await compiler.compileStructuralTag(formatOf(spec));
      return {
        async match() {
          const matcher = await GrammarMatcher.createGrammarMatcher(compiled);
          return {
            accept: (tokenId) => matcher.acceptToken(tokenId),
            allowed: () => matcher.getNextTokenBitmask(),
            close: () => matcher.dispose(),
          };
        },
        close: () => compiled.dispose(),
      };
    },
  };
}

/** As the library writes it: text, calls in text, or calls alone. */
function formatOf({ answer, calls }: GrammarSpec): library.StructuralTagFormat {
  const form = (grammar: string): library.GrammarFormat => ({ type: 'grammar', grammar });
  if (calls === undefined) return form(answer!);
  const { trigger, separator, isRequired, isSingle } = calls;
  const tags = calls.tools.map(
    ({ begin, argumentsGrammar, end }): library.TagFormat => ({
      ...{ type: 'tag', begin, end },
      content: form(argumentsGrammar),
    }),
  );
  const only: library.TagsWithSeparatorFormat = {
    ...{ type: 'tags_with_separator', tags, separator },
    ...{ at_least_one: true, stop_after_first: isSingle },
  };
  if (isRequired) return only;
  // The library takes no list of calls as one of several forms, so beside a form there is one call.
  if (answer !== undefined) return { type: 'or', elements: [form(answer), ...tags] };
  return { type: 'triggered_tags', triggers: [trigger], tags, stop_after_first: isSingle };
}

let loaded: Promise<typeof library> | undefined;

/**
 * The package says that it is a module and is a script: loaded as it is, it looks for `require` and `__filename` and finds
 * none, and puts what it exports into a global. It gets what it looks for, in the thread that is there for it alone.
 */
function load(): Promise<typeof library> {
  loaded ??= (async () => {
    const require = createRequire(import.meta.url);
    const filename = require.resolve('@mlc-ai/web-xgrammar');
    const globals = globalThis as { require?: unknown; __filename?: string; xgrammar?: typeof library };
    Object.assign(globals, { require, __filename: filename });
    await import('@mlc-ai/web-xgrammar');
    return globals.xgrammar!;
  })();
  return loaded;
}

/*
 * The thread, and what it and the main thread say to each other. Tokens come and allowed tokens go by shared memory, straight
 * from and to the engine (`engine/grammar.ts`).
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
  /** `took_ms`: of the processor, for compiling; 0 when the grammar was known. */
  | { readonly type: 'done'; readonly id: number; readonly took_ms: number }
  | { readonly type: 'failed'; readonly id: number; readonly detail: string };

/** Some megabytes each at most. */
const GRAMMARS_MAX = 32;

type Session = {
  readonly words: SharedArrayBuffer;
  readonly header: Int32Array;
  readonly bits: Int32Array;
  readonly matcher: Matcher;
};

class Sessions {
  readonly #compiler: Compiler;
  readonly #endTokenId: number;
  /** What is thrown away here lives on in the matchers that were made of it. */
  readonly #grammars = new LRUCache<string, Compiled>({
    max: GRAMMARS_MAX,
    dispose: (compiled) => compiled.close(),
  });
  readonly #open = new Map<number, Session>();

  constructor(compiler: Compiler, endTokenId: number) {
    this.#compiler = compiler;
    this.#endTokenId = endTokenId;
  }

  async compile(key: string, spec: GrammarSpec): Promise<{ compiled: Compiled; took_ms: number }> {
    const known = this.#grammars.get(key);
    if (known !== undefined) return { compiled: known, took_ms: 0 };
    const before = process.threadCpuUsage();
    const compiled = await this.#compiler.compile(spec);
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
      matcher: await compiled.match(),
    };
    this.#open.set(id, session);
    await this.#tell(session, 0);
    return took_ms;
  }

  /** The engine may be in a step of an answer whose client left. */
  close(id: number): void {
    const session = this.#open.get(id);
    if (session === undefined) return;
    this.#open.delete(id);
    session.matcher.close();
    giveUp(session.words);
  }

  /** Goes on with every answer that has a new token. */
  async advance(): Promise<void> {
    for (const session of [...this.#open.values()]) {
      const { words, header, matcher } = session;
      const accepted = Atomics.load(header, HEADER.accepted);
      const matched = Atomics.load(header, HEADER.matched);
      if (matched === FAILED || matched === accepted) continue;
      try {
        if (!matcher.accept(header[HEADER.token]!)) throw new Error('a token that may not follow');
        await this.#tell(session, accepted);
      } catch {
        giveUp(words);
      }
    }
  }

  async #tell({ header, bits, matcher }: Session, accepted: number): Promise<void> {
    const allowed = await matcher.allowed();
    const [word, bit] = [this.#endTokenId >> 5, 1 << (this.#endTokenId & 31)];
    header[HEADER.mayEnd] = (allowed[word]! & bit) === 0 ? 0 : 1;
    allowed[word]! &= ~bit;
    bits.set(allowed);
    Atomics.store(header, HEADER.matched, accepted);
    Atomics.notify(header, HEADER.matched);
  }
}

/** Small, and of every usual kind: compiling it makes the library ready to run fast. */
const FIRST: GrammarSpec = {
  answer: 'root ::= "{\\"a\\": \\"" ([^"\\\\] | "\\\\" ["n])* "\\"}"',
  calls: undefined,
};

async function serve(port: NonNullable<typeof parentPort>): Promise<void> {
  const { vocabulary, bell } = workerData as GrammarThreadStart;
  const compiler = await openCompiler(vocabulary);
  (await compiler.compile(FIRST)).close();
  const sessions = new Sessions(compiler, vocabulary.endTokenId);
  const send = (message: FromGrammarThread): void => port.postMessage(message);
  // One after the other: what the library does, it does on one heap.
  let before = Promise.resolve();
  const inTurn = (work: () => Promise<void> | void): void => {
    before = before.then(work);
  };
  const answer = (id: number, work: () => Promise<number>): void =>
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
    inTurn(() => sessions.advance());
    await before;
  }
}

if (import.meta.main) await serve(parentPort!);
