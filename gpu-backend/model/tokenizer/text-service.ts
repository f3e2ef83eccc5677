/**
 * Requests' text to token ids, off the thread that answers them. Tenants take turns of some milliseconds; the tenant
 * that has had the least of the thread's time comes first, so a tenant that floods it waits for itself. A request that
 * leaves is dropped at the end of a turn. A turn that does not end (a chat template is a stranger's program) ends with
 * its thread: its job is refused, and a new thread begins the others again.
 */
import { Worker } from 'node:worker_threads';
import { cancellation, MaskrouteError } from '../../../shared/wire/errors.ts';
import { messageTexts } from '../../../shared/wire/openai.ts';
import type { TextManifest } from './model-text.ts';
import type { FromTextThread, TextJob, TextThreadStart, ToTextThread } from './text-thread.ts';
import { createTokenReader, type TokenReader, type TokenTable } from './token-bytes.ts';
import type { ToolFormat } from './tool-format.ts';

export type { TextJob };

type TextCall = {
  readonly tenant: string;
  readonly signal: AbortSignal;
  /** Tokens that were made for the call so far, kept up to date, also when it fails: what it has cost. */
  readonly spent: { tokens: number };
};

type EncodedText =
  | { readonly type: 'encoded'; readonly prompts: readonly Int32Array[] }
  /** A prompt has more than `tokensMax` tokens. */
  | { readonly type: 'too_long' };

export type TextService = TokenReader & {
  /** How the model calls tools. */
  readonly toolFormat: ToolFormat;
  /** What all tokens are read from, as plain data. */
  readonly table: TokenTable;
  /**
   * Rejects with MaskrouteError `invalid_request` when the template refuses or takes too long, `queue_full`,
   * `engine_failed`, or what `signal` says, `cancelled` by default.
   */
  encode(job: TextJob, call: TextCall): Promise<EncodedText>;
  close(): Promise<void>;
};

type TextServiceOptions = {
  /** The model's in the store. */
  readonly folder: string;
  readonly manifest: TextManifest;
  /** Hears of failures with their stack, which the wire never carries. */
  readonly onError: (detail: string) => void;
  readonly limits?: Partial<TextLimits>;
};

export type TextLimits = {
  /** Of all texts that wait. Past it a tenant that has most of them is refused. */
  readonly waitingCharsMax: number;
  /** A turn takes some milliseconds, and some more to render a long conversation; a busy machine, many times that. */
  readonly turn_ms: number;
  /** Of the thread. A template that hoards memory ends in it. */
  readonly heap_MB: number;
};

/** Some seconds of work on one core. */
const DEFAULT_LIMITS: TextLimits = { waitingCharsMax: 8 * 1024 * 1024, turn_ms: 3000, heap_MB: 512 };

/** What a job takes beyond its letters. */
const JOB_CHARS = 4096;

type Job = {
  readonly id: number;
  readonly job: TextJob;
  readonly chars: number;
  readonly call: TextCall;
  /** Whether the thread that lives now has it. */
  isSent: boolean;
  settle(outcome: EncodedText | MaskrouteError): void;
};

/** Resolves once the thread is there. Rejects with MaskrouteError `engine_failed`, and the reason, when it does not start. */
export async function openTextService(options: TextServiceOptions): Promise<TextService> {
  const limits = { ...DEFAULT_LIMITS, ...options.limits };
  const { thread, table, toolFormat } = await openThread(options, limits);
  const turns = new Turns(options, limits, thread);
  return {
    ...createTokenReader(table),
    table,
    toolFormat,
    encode: (job, call) => turns.encode(job, call),
    close: () => turns.close(),
  };
}

/** Whose turn the thread has. */
class Turns {
  readonly #options: TextServiceOptions;
  readonly #limits: TextLimits;
  readonly #line: Line;
  /** Undefined after its end, until another is there. */
  #thread: TextThread | undefined;
  #isOpening = false;
  #isClosed = false;
  #turning: Job | undefined;
  #ids = 0;

  constructor(options: TextServiceOptions, limits: TextLimits, thread: TextThread) {
    this.#options = options;
    this.#limits = limits;
    this.#line = new Line(limits.waitingCharsMax);
    this.#thread = thread;
  }

  async encode(job: TextJob, call: TextCall): Promise<EncodedText> {
    if (this.#isClosed) throw lost();
    if (call.signal.aborted) throw cancellation(call.signal);
    const { promise, resolve: settle } = Promise.withResolvers<EncodedText | MaskrouteError>();
    const added: Job = { id: this.#ids++, job, chars: charsOf(job), call, isSent: false, settle };
    const leave = () => this.#leave(added);
    call.signal.addEventListener('abort', leave, { once: true });
    try {
      for (const displaced of this.#line.add(added, this.#turning)) this.#drop(displaced, queueFull());
      void this.#work();
      const outcome = await promise;
      if (outcome instanceof MaskrouteError) throw outcome;
      return outcome;
    } finally {
      call.signal.removeEventListener('abort', leave);
    }
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    for (const job of this.#line.takeAll()) job.settle(lost());
    await this.#thread?.close();
  }

  /** Gives the next job a turn, and the ones after it theirs. */
  async #work(): Promise<void> {
    if (this.#turning !== undefined || this.#isOpening || this.#isClosed || this.#line.isEmpty) return;
    if (this.#thread === undefined || this.#thread.isGone) return this.#reopen();
    const job = this.#line.next()!;
    this.#turning = job;
    const started_ms = performance.now();
    const message = { type: 'turn', id: job.id, job: job.isSent ? undefined : job.job } as const;
    const ended = await this.#thread.turn(message);
    this.#turning = undefined;
    if (this.#isClosed) return;
    job.isSent = true;
    this.#line.charge(job, performance.now() - started_ms);
    if (ended.type === 'lost') {
      this.#thread = undefined;
      this.#options.onError(`a request ended the thread that reads text: ${ended.why}`);
    } else if (ended.outcome.type === 'failed') this.#options.onError(ended.outcome.detail);
    const outcome = outcomeOf(job, ended);
    if (outcome !== undefined) {
      this.#line.remove(job);
      job.settle(outcome);
    } else if (job.call.signal.aborted) this.#leave(job);
    else this.#line.toTheEnd(job);
    void this.#work();
  }

  /** A running turn ends first, so that what it cost is known. */
  #leave(job: Job): void {
    if (this.#turning === job) return;
    this.#line.remove(job);
    this.#drop(job, cancellation(job.call.signal));
  }

  #drop(job: Job, reason: MaskrouteError): void {
    if (job.isSent) this.#thread?.send({ type: 'drop', id: job.id });
    job.settle(reason);
  }

  /** Opens a new thread when the old one has ended. If it does not start, all that waits is refused. */
  async #reopen(): Promise<void> {
    this.#isOpening = true;
    this.#line.forgetThread();
    try {
      this.#thread = (await openThread(this.#options, this.#limits)).thread;
      if (this.#isClosed) await this.#thread.close();
    } catch (error) {
      this.#options.onError((error as Error).stack ?? String(error));
      for (const job of this.#line.takeAll()) job.settle(lost());
    }
    this.#isOpening = false;
    void this.#work();
  }
}

/** What a turn has brought its job, and what that has cost; undefined: it needs another turn. */
function outcomeOf({ job, chars, call }: Job, ended: Turned): EncodedText | MaskrouteError | undefined {
  const { spent } = call;
  if (ended.type === 'lost') {
    // Nobody can say what it has cost, so it costs what its prompt could: a token a letter.
    spent.tokens = Math.max(spent.tokens, Math.min(chars, job.tokensMax));
    return tooMuch(job, ended.why);
  }
  const { outcome, tokens } = ended;
  spent.tokens = tokens;
  switch (outcome.type) {
    case 'paused':
      return undefined;
    case 'encoded':
    case 'too_long':
      return outcome;
    case 'refused':
      return new MaskrouteError(outcome.code, outcome.message, { param: outcome.param });
    case 'failed':
      return lost();
  }
}

const lost = (): MaskrouteError =>
  new MaskrouteError('engine_failed', 'The text of requests cannot be read at the moment.');

const queueFull = (): MaskrouteError =>
  new MaskrouteError('queue_full', 'Too much text is waiting to be read already.', { retryAfter_s: 1 });

const tooMuch = ({ type }: TextJob, why: string): MaskrouteError => {
  const param = type === 'chat' ? 'messages' : 'prompt';
  const what = type === 'chat' ? "The model's chat template or its tokenizer" : "The model's tokenizer";
  return new MaskrouteError('invalid_request', `${what} cannot cope with this text: ${why}.`, { param });
};

function charsOf(job: TextJob): number {
  const texts =
    job.type === 'prompts'
      ? job.texts
      : [
          ...job.messages.flatMap(messageTexts),
          ...(job.tools === undefined ? [] : [JSON.stringify(job.tools)]),
        ];
  return texts.reduce((sum, { length }) => sum + length, 0);
}

/** Jobs that wait and the one whose turn it is, which stays where it is. */
class Line {
  readonly #charsMax: number;
  /** A tenant's own take turns, too: the next of each tenant comes first. */
  readonly #jobs: Job[] = [];
  /** The thread's time that tenants had since the line was last empty. */
  readonly #had_ms = new Map<string, number>();

  constructor(charsMax: number) {
    this.#charsMax = charsMax;
  }

  get isEmpty(): boolean {
    return this.#jobs.length === 0;
  }

  /** Jobs that have to go for it: the newest of the tenant that has most, itself perhaps. Never `turning`. */
  add(job: Job, turning: Job | undefined): Job[] {
    const { tenant } = job.call;
    const others = this.#jobs.map((one) => this.#had_ms.get(one.call.tenant) ?? 0);
    // Who comes has had no less than who waits: having been away earns nothing.
    const least_ms = others.length === 0 ? 0 : Math.min(...others);
    this.#had_ms.set(tenant, Math.max(this.#had_ms.get(tenant) ?? 0, least_ms));
    this.#jobs.push(job);
    const displaced: Job[] = [];
    while (this.#chars() > this.#charsMax) {
      const movable = this.#jobs.filter((one) => one !== turning);
      const most = maxBy([...new Set(movable.map((one) => one.call.tenant))], (name) => this.#chars(name));
      const newest = maxBy(
        movable.filter((one) => one.call.tenant === most),
        ({ id }) => id,
      );
      if (newest === undefined) break;
      this.remove(newest);
      displaced.push(newest);
    }
    return displaced;
  }

  next(): Job | undefined {
    return maxBy(this.#jobs, ({ call }) => -(this.#had_ms.get(call.tenant) ?? 0));
  }

  charge({ call }: Job, took_ms: number): void {
    this.#had_ms.set(call.tenant, (this.#had_ms.get(call.tenant) ?? 0) + took_ms);
  }

  toTheEnd(job: Job): void {
    this.#jobs.push(...this.#jobs.splice(this.#jobs.indexOf(job), 1));
  }

  remove(job: Job): void {
    const at = this.#jobs.indexOf(job);
    if (at >= 0) this.#jobs.splice(at, 1);
    if (this.#jobs.length === 0) this.#had_ms.clear();
  }

  takeAll(): Job[] {
    this.#had_ms.clear();
    return this.#jobs.splice(0);
  }

  /** A new one knows no job. */
  forgetThread(): void {
    for (const job of this.#jobs) job.isSent = false;
  }

  #chars(tenant?: string): number {
    return this.#jobs.reduce(
      (sum, { chars, call }) =>
        tenant === undefined || call.tenant === tenant ? sum + chars + JOB_CHARS : sum,
      0,
    );
  }
}

/** The first of those with the most. */
const maxBy = <Item>(items: readonly Item[], of: (item: Item) => number): Item | undefined =>
  items.reduce<Item | undefined>(
    (best, one) => (best === undefined || of(one) > of(best) ? one : best),
    undefined,
  );

type Turned = Extract<FromTextThread, { type: 'turned' }> | { readonly type: 'lost'; readonly why: string };

type TextThread = {
  readonly isGone: boolean;
  send(message: ToTextThread): void;
  /** One at a time. `lost`: the thread is gone, or was ended because it did not stop. */
  turn(message: ToTextThread): Promise<Turned>;
  close(): Promise<void>;
};

async function openThread(
  { folder, manifest, onError }: TextServiceOptions,
  { turn_ms, heap_MB }: TextLimits,
) {
  const { chatTemplate, bosTokenId, eosTokenIds } = manifest;
  const workerData: TextThreadStart = { folder, manifest: { chatTemplate, bosTokenId, eosTokenIds } };
  const worker = new Worker(new URL('./text-thread.ts', import.meta.url), {
    workerData,
    resourceLimits: { maxOldGenerationSizeMb: heap_MB, maxYoungGenerationSizeMb: 4 },
  });
  let heard: (message: FromTextThread | { type: 'lost'; why: string }) => void = () => {};
  let why = 'it takes too much';
  let failure = 'its thread ended';
  worker.on('message', (message: FromTextThread) => heard(message));
  worker.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'ERR_WORKER_OUT_OF_MEMORY') why = `it takes more than ${heap_MB} MB`;
    failure = error.message;
    onError(error.stack ?? String(error));
  });
  let isGone = false;
  worker.on('exit', () => {
    isGone = true;
    heard({ type: 'lost', why });
  });
  const hear = () =>
    new Promise<Parameters<typeof heard>[0]>((resolve) => {
      heard = resolve;
    });
  const started = await hear();
  if (started.type !== 'ready')
    throw new MaskrouteError('engine_failed', `The model's tokenizer cannot be opened: ${failure}`);
  const thread: TextThread = {
    get isGone() {
      return isGone;
    },
    send: (message) => worker.postMessage(message),
    async turn(message) {
      const answer = hear();
      worker.postMessage(message);
      const late = setTimeout(() => {
        why = `it takes more than ${turn_ms / 1000} s`;
        void worker.terminate();
      }, turn_ms);
      const ended = await answer;
      clearTimeout(late);
      return ended as Turned;
    },
    async close() {
      await worker.terminate();
    },
  };
  return { thread, table: started.table, toolFormat: started.toolFormat };
}
