/** What a long import tells whoever waits for it. */

export type ImportPhase = 'download' | 'unpack' | 'verify' | 'convert';

export type ImportProgress = {
  readonly phase: ImportPhase;
  readonly done: number;
  /** Undefined while the size is not known. */
  readonly total: number | undefined;
  readonly unit: 'bytes' | 'percent';
};

export type ImportHooks = {
  readonly onProgress: (progress: ImportProgress) => void;
  /** One line for a person: which source was taken, what was skipped and why. */
  readonly log: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};
