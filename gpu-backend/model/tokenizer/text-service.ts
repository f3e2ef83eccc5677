/**
 * Encodes requests' text to token ids, in a thread of its own. Jobs take turns of some milliseconds; the tenant that has had
 * the least of the thread's time is next, so a tenant that floods the thread delays only itself. A cancelled job is dropped
 * at the end of its turn. When a turn does not end (a chat template is an untrusted program), its thread is terminated, its
 * job is refused, and a new thread starts the other jobs again.
 */
import { isDeepStrictEqual } from 'node:util';
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
  /** The call's cost: the tokens made so far. Kept up to date, also when the call fails. */
  readonly spent: { tokens: number };
};

type EncodedText =
  | { readonly type: 'encoded'; readonly prompts: readonly Int32Array[] }
  /** A prompt has more than `tokensMax` tokens. */
  | { readonly type: 'too_long' };

export type TextService = TokenReader & {
  /** How the model calls tools. */
  readonly toolFormat: ToolFormat;
  /** The bytes of all tokens, as plain data. */
  readonly table: TokenTable;
  /**
   * Rejects with MaskrouteError `invalid_request` when the template refuses or takes too long, `queue_full`,
   * `engine_failed`, or the reason of `signal`, `cancelled` by default.
   */
  encode(job: TextJob, call: TextCall): Promise<EncodedText>;
  close(): Promise<void>;
};

type TextServiceOptions = {
  /** The model's folder in the store. */
  readonly folder: string;
  readonly manifest: TextManifest;
  /** Gets the stack of a failure, which clients never see. */
  readonly onError: (detail: string) => void;
  readonly limits?: Partial<TextLimits>;
};

export type TextLimits = {
  /** Most characters of all waiting texts. Beyond it, jobs of the tenant with the most characters are refused. */
  readonly waitingCharsMax: number;
  /** Most time of a turn. Turns take some milliseconds, longer for a long conversation, many times that on a busy machine. */
  readonly turn_ms: number;
  /** The thread's heap; bounds the memory of a template. */
  readonly heap_MB: number;
};

/** Some seconds of work on one core. */
const DEFAULT_LIMITS: TextLimits = { waitingCharsMax: 8 * 1024 * 1024, turn_ms: 3000, heap_MB: 512 };

/** A job counts as so many characters in addition to its text. */
const JOB_CHARS = 4096;

type Job = {
  readonly id: number;
  readonly job: TextJob;
  readonly chars: number;
  readonly call: TextCall;
  /** Whether the current thread has the job. */
  isSent: boolean;
  settle(outcome: EncodedText | MaskrouteError): void;
};

/** Resolves once the thread is ready. Rejects with MaskrouteError `engine_failed` and the reason when it does not start. */
export async function openTextService(options: TextServiceOptions): Promise<TextService> {
  const limits = { ...DEFAULT_LIMITS, ...options.limits };
  const { thread, table, toolFormat } = await openThread(options, limits);
  const turns = new Turns(options, limits, thread, table);
  return {
    ...createTokenReader(table),
    table,
    toolFormat,
    encode: (job, call) => turns.encode(job, call),
    close: () => turns.close(),
  };
}

/** Gives jobs their turns on the thread, and replaces a thread that ended. */
class Turns {
  readonly #options: TextServiceOptions;
  readonly #limits: TextLimits;
  readonly #line: Line;
  readonly #table: TokenTable;
  /** Undefined after the thread ended, until a new thread is ready. */
  #thread: TextThread | undefined;
  #isOpening = false;
  #isClosed = false;
  #turning: Job | undefined;
  #ids = 0;

  constructor(options: TextServiceOptions, limits: TextLimits, thread: TextThread, table: TokenTable) {
    this.#options = options;
    this.#limits = limits;
    this.#table = table;
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

  /** Gives jobs turns, one after the other, until none is left. */
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
      this.#options.onError(`a request ended the tokenizer thread: ${ended.why}`);
    } else if (ended.outcome.type === 'failed') this.#options.onError(ended.outcome.detail);
    const outcome = outcomeOf(job, ended);
    if (outcome !== undefined) {
      this.#line.remove(job);
      job.settle(outcome);
    } else if (job.call.signal.aborted) this.#leave(job);
    else this.#line.toTheEnd(job);
    void this.#work();
  }

  /** Drops a cancelled job. During its turn, this waits for the end of the turn, when its cost is known. */
  #leave(job: Job): void {
    if (this.#turning === job) return;
    this.#line.remove(job);
    this.#drop(job, cancellation(job.call.signal));
  }

  #drop(job: Job, reason: MaskrouteError): void {
    if (job.isSent) this.#thread?.send({ type: 'drop', id: job.id });
    job.settle(reason);
  }

  /** Opens a new thread after the old thread ended. If it does not start, all waiting jobs are refused. */
  async #reopen(): Promise<void> {
    this.#isOpening = true;
    this.#line.forgetThread();
    try {
      const { thread, table } = await openThread(this.#options, this.#limits);
      const isSame = isDeepStrictEqual(table, this.#table);
      if (this.#isClosed || !isSame) await thread.close();
      // The engine keeps the model that it has open, which has other tokens.
      if (!isSame)
        throw new Error('another model was installed in place of this one: start the backend again');
      this.#thread = thread;
    } catch (error) {
      this.#options.onError((error as Error).stack ?? String(error));
      for (const job of this.#line.takeAll()) job.settle(lost());
    }
    this.#isOpening = false;
    void this.#work();
  }
}

/** The outcome of a job after a turn; undefined when it needs another turn. Updates the call's cost. */
function outcomeOf({ job, chars, call }: Job, ended: Turned): EncodedText | MaskrouteError | undefined {
  const { spent } = call;
  if (ended.type === 'lost') {
    // The cost is unknown, so the most that the prompt can have is charged: a token for each character.
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

/** The waiting jobs, and the job whose turn it is, which keeps its place. */
class Line {
  readonly #charsMax: number;
  /** In the order of turns within each tenant. */
  readonly #jobs: Job[] = [];
  /** The thread's time of each tenant since the line was last empty. */
  readonly #had_ms = new Map<string, number>();

  constructor(charsMax: number) {
    this.#charsMax = charsMax;
  }

  get isEmpty(): boolean {
    return this.#jobs.length === 0;
  }

  /** Adds a job, and returns the jobs that it displaces: the newest of the tenant with the most text, never `turning`. */
  add(job: Job, turning: Job | undefined): Job[] {
    const { tenant } = job.call;
    const others = this.#jobs.map((one) => this.#had_ms.get(one.call.tenant) ?? 0);
    // A tenant that was away gets no credit for that time: it starts at the least of the waiting tenants.
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

  /** Marks all jobs as not sent, as a new thread has none. */
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

/** The first item with the largest value. */
const maxBy = <Item>(items: readonly Item[], of: (item: Item) => number): Item | undefined =>
  items.reduce<Item | undefined>(
    (best, one) => (best === undefined || of(one) > of(best) ? one : best),
    undefined,
  );

type Turned = Extract<FromTextThread, { type: 'turned' }> | { readonly type: 'lost'; readonly why: string };

type TextThread = {
  readonly isGone: boolean;
  send(message: ToTextThread): void;
  /** Runs one turn; call one at a time. `lost`: the thread ended, or was terminated because the turn took too long. */
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
