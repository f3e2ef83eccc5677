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
