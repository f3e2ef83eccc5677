/**
 * The only file that knows `@mlc-ai/web-xgrammar`, xgrammar as WebAssembly. It compiles grammars for one vocabulary and
 * matches answers with them. A failed check inside it ends as a `RuntimeError`, after which its memory cannot be trusted: then
 * a new thread has to begin.
 */
import { createRequire } from 'node:module';
import type * as library from '@mlc-ai/web-xgrammar';
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
export type Matcher = {
  /** Whether the token may follow. */
  accept(tokenId: number): boolean;
  allowed(): Promise<Int32Array>;
  close(): void;
};

export type Compiled = { match(): Promise<Matcher>; close(): void };

export type Vocabulary = {
  readonly table: TokenTable;
  /** The width of the model's logits; there may be fewer tokens. */
  readonly size: number;
  /** Stands for the end of the text. */
  readonly endTokenId: number;
};

export type Compiler = { compile(spec: GrammarSpec): Promise<Compiled> };

export async function openCompiler({ table, size, endTokenId }: Vocabulary): Promise<Compiler> {
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
