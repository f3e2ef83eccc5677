/**
 * Entry point of a thread that compiles grammars and matches answers with them, and what it and the main thread say to each
 * other. Tokens come and allowed tokens go by shared memory, straight from and to the engine (`engine/grammar.ts`).
 */
import { parentPort, workerData } from 'node:worker_threads';
import { LRUCache } from 'lru-cache';
import { FAILED, type GrammarSession, HEADER } from '../engine/grammar.ts';
import {
  type Compiled,
  type Compiler,
  type GrammarSpec,
  type Matcher,
  openCompiler,
  type Vocabulary,
} from './xgrammar.ts';

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
      header: new Int32Array(words, 0, HEADER.words),
      bits: new Int32Array(words, HEADER.words * Int32Array.BYTES_PER_ELEMENT),
      matcher: await compiled.match(),
    };
    this.#open.set(id, session);
    await this.#tell(session, 0);
    return took_ms;
  }

  close(id: number): void {
    this.#open.get(id)?.matcher.close();
    this.#open.delete(id);
  }

  /** Goes on with every answer that has a new token. */
  async advance(): Promise<void> {
    for (const session of [...this.#open.values()]) {
      const { header, matcher } = session;
      const accepted = Atomics.load(header, HEADER.accepted);
      const matched = Atomics.load(header, HEADER.matched);
      if (matched === FAILED || matched === accepted) continue;
      try {
        if (!matcher.accept(header[HEADER.token]!)) throw new Error('a token that may not follow');
        await this.#tell(session, accepted);
      } catch {
        say(header, FAILED);
      }
    }
  }

  async #tell({ header, bits, matcher }: Session, accepted: number): Promise<void> {
    const allowed = await matcher.allowed();
    const [word, bit] = [this.#endTokenId >> 5, 1 << (this.#endTokenId & 31)];
    header[HEADER.mayEnd] = (allowed[word]! & bit) === 0 ? 0 : 1;
    allowed[word]! &= ~bit;
    header[HEADER.isOver] = allowed.every((word) => word === 0) ? 1 : 0;
    bits.set(allowed);
    say(header, accepted);
  }
}

function say(header: Int32Array, matched: number): void {
  Atomics.store(header, HEADER.matched, matched);
  Atomics.notify(header, HEADER.matched);
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

if (parentPort !== null) await serve(parentPort);
