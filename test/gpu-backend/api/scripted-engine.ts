/**
 * An engine that says what a test tells it to, at the pace and with the faults that it asks for. It keeps the
 * engine's contract (bounded line, cancellation within a step, one `finished` event), and no more.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { ServedModel, TokenText } from '../../../gpu-backend/api/parts.ts';
import type {
  Engine,
  EngineEvent,
  EngineModel,
  GenerateRequest,
  Timings,
  TokenLogprob,
} from '../../../gpu-backend/engine/engine.ts';
import { createGrammars } from '../../../gpu-backend/grammar/grammars.ts';
import { tokenTable } from '../../../gpu-backend/model/tokenizer/token-bytes.ts';
import { PLAIN_FORMAT } from '../../../gpu-backend/model/tokenizer/tool-format.ts';
import { CPU } from '../../../gpu-backend/onnx/device.ts';
import type { ModelHash } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';

export const MODEL_HASH = 'ab'.repeat(32) as ModelHash;
export const END_TOKEN = 256;
export const USER_TOKEN = 257;
const NAMES: Record<number, string> = { [END_TOKEN]: '<|end|>', [USER_TOKEN]: '<|user|>' };
const VOCABULARY = 258;

export type Script = {
  /** Token ids of the answer; without an end token it goes on until `maxTokens`, repeating the last. */
  readonly answer: (request: GenerateRequest) => readonly number[];
  readonly prefill_ms?: number;
  /** Before each token; or before the one of this number. */
  readonly step_ms?: number | ((token: number) => number);
  /** The answer ends no sooner than this. */
  readonly lastToken?: Promise<void>;
  /** All tokens, of `maxTokens`, are computed before the first one is read. */
  readonly computesAhead?: boolean;
  /** Thrown after so many tokens. */
  readonly failure?: { readonly afterTokens: number; readonly error: Error };
  /** After so many tokens it is silent, until the request is cancelled. */
  readonly stallsAfter?: number;
  readonly onStall?: () => void;
  readonly slots?: number;
  readonly queueCapacity?: number;
  /** Says so before a request is read, too. */
  readonly isFull?: boolean;
  /** What a full line says of coming back; 1 unless given. */
  readonly retryAfter_s?: number;
  readonly contextTokens?: number;
  /** Ignores cancellation: what a hung runtime looks like. */
  readonly hangs?: boolean;
  /** What a thread that is stuck looks like. */
  readonly silence_ms?: number;
  /** A token's log-probability; minus its id over a hundred unless given. */
  readonly logprob?: (tokenId: number) => number;
  /** What an answer of so many tokens took. */
  readonly timings?: (tokens: number) => Timings;
  /** What the engine says of itself instead of the truth. */
  readonly stats?: Partial<ReturnType<Engine['stats']>>;
  /** What is different for one request. */
  readonly of?: (request: GenerateRequest) => Partial<Script> | undefined;
};

/** Answers with this text. */
export const says = (text: string): Script => ({ answer: () => [...bytesOf(text), END_TOKEN] });

const lineIsFull = ({ retryAfter_s = 1 }: Script): MaskrouteError =>
  new MaskrouteError('queue_full', 'The queue is full.', { retryAfter_s });

const TIMINGS: Timings = { queue_ms: 1, prefill_ms: 2, decode_ms: 3, stepGap_ms: 4 };

export type ScriptedEngine = Engine & {
  readonly requests: GenerateRequest[];
  readonly ended: { requestId: string; reason: string; tokens: number }[];
  /** Replaces the script for requests that come from now on. */
  script: Script;
};

export const bytesOf = (text: string): number[] => [...new TextEncoder().encode(text)];

export function scriptedEngine(
  initial: Script,
  model: Pick<EngineModel, 'hash' | 'blockCount'> = { hash: MODEL_HASH, blockCount: 8 },
): ScriptedEngine {
  const slots = new Slots();
  let generated = 0;
  const engine: ScriptedEngine = {
    requests: [],
    ended: [],
    script: initial,
    model: {
      ...model,
      device: CPU,
      kv: { type: 'f32', page_bytes: 64 },
      get contextTokens() {
        return engine.script.contextTokens ?? 512;
      },
      vocabularySize: VOCABULARY,
    },
    async *generate(request, signal, onToken): AsyncGenerator<EngineEvent, void> {
      engine.requests.push(request);
      const script = { ...engine.script, ...engine.script.of?.(request) };
      const admitted = await slots.admit(script, signal);
      const answer: Answer = { reason: 'cancelled', tokens: 0 };
      try {
        if (script.hangs) await new Promise(() => {});
        if (script.prefill_ms) await sleep(script.prefill_ms, undefined, { signal }).catch(() => {});
        if (request.promptLogprobs !== undefined && !signal.aborted) yield promptLogprobs(request);
        if (script.computesAhead) for (let token = 0; token < request.maxTokens; token++) onToken?.();
        for await (const event of say(script, request, { answer, signal })) {
          generated++;
          if (!script.computesAhead) onToken?.();
          yield event;
        }
        yield finished(script, request, answer);
      } finally {
        if (admitted) slots.leave();
        engine.ended.push({ requestId: request.requestId, reason: answer.reason, tokens: answer.tokens });
      }
    },
    stats: () => ({
      requestsRunning: slots.running,
      requestsWaiting: slots.waiting,
      queueCapacity: engine.script.queueCapacity ?? 16,
      kvCacheUsage: 0.25,
      stepAge_ms: slots.running > 0 ? 1500 : 0,
      queueAge_ms: slots.waiting > 0 ? 2500 : 0,
      batchSize: slots.running,
      pagesUsed: 16,
      pagesTotal: 64,
      prefixQueriesTotal: 0,
      prefixHitsTotal: 0,
      preemptionsTotal: 0,
      stepsTotal: generated,
      promptTokensTotal: 0,
      generatedTokensTotal: generated,
      ...engine.script.stats,
    }),
    failure: undefined,
    expectRoom: () => {
      if (engine.script.isFull) throw lineIsFull(engine.script);
    },
    reserve: (tenant, countMax) => {
      engine.expectRoom(tenant);
      return Array.from({ length: countMax }, () => () => {});
    },
    silence_ms: () => engine.script.silence_ms ?? 0,
    close: async () => {},
  };
  return engine;
}

/** The running places and the line in front of them. */
class Slots {
  running = 0;
  readonly #waiting: (() => void)[] = [];

  get waiting(): number {
    return this.#waiting.length;
  }

  /** Whether the request got a slot; not, when it was cancelled in the line. */
  async admit(script: Script, signal: AbortSignal): Promise<boolean> {
    if (this.running < (script.slots ?? 8)) {
      this.running++;
      return true;
    }
    if (this.waiting >= (script.queueCapacity ?? 16)) throw lineIsFull(script);
    return new Promise((resolve) => {
      // A slot that is handed on stays taken, so `running` does not change.
      const enter = () => resolve(true);
      this.#waiting.push(enter);
      signal.addEventListener('abort', () => {
        const place = this.#waiting.indexOf(enter);
        if (place >= 0) this.#waiting.splice(place, 1);
        resolve(false);
      });
    });
  }

  leave(): void {
    const next = this.#waiting.shift();
    if (next === undefined) this.running--;
    else next();
  }
}

/** How far an answer came. */
type Answer = {
  reason: 'stop' | 'length' | 'cancelled';
  tokens: number;
  stopLogprob?: TokenLogprob | undefined;
};

/** The answer's tokens, as the script says them; it writes down in `answer` how they end. */
async function* say(
  script: Script,
  request: GenerateRequest,
  { answer, signal }: { readonly answer: Answer; readonly signal: AbortSignal },
): AsyncGenerator<EngineEvent, void> {
  const ids = script.answer(request);
  const logprobs = (id: number) =>
    request.logprobs === undefined ? undefined : logprobOf(id, request.logprobs, script.logprob);
  while (!signal.aborted) {
    const { tokens } = answer;
    if (script.failure?.afterTokens === tokens) throw script.failure.error;
    if (script.stallsAfter === tokens) return await stall(script, signal);
    const tokenId = ids[Math.min(tokens, ids.length - 1)]!;
    const isLong = tokens >= request.maxTokens;
    const isEnd = request.stopTokenIds.includes(tokenId);
    if (isLong || isEnd) {
      answer.reason = isLong ? 'length' : 'stop';
      if (!isLong) answer.stopLogprob = logprobs(tokenId);
      return await script.lastToken;
    }
    const { step_ms = 0 } = script;
    const pause_ms = typeof step_ms === 'number' ? step_ms : step_ms(tokens);
    if (pause_ms > 0) await sleep(pause_ms, undefined, { signal }).catch(() => {});
    if (signal.aborted) return;
    answer.tokens++;
    yield { type: 'token', tokenId, logprob: logprobs(tokenId) };
  }
}

async function stall({ onStall }: Script, signal: AbortSignal): Promise<void> {
  onStall?.();
  if (!signal.aborted) await new Promise((resolve) => signal.addEventListener('abort', resolve));
}

const promptLogprobs = ({ promptTokenIds, promptLogprobs: count }: GenerateRequest): EngineEvent => ({
  type: 'prompt',
  logprobs: [...promptTokenIds].map((id, position) => (position === 0 ? null : logprobOf(id, count!))),
});

const finished = (script: Script, request: GenerateRequest, answer: Answer): EngineEvent => ({
  type: 'finished',
  reason: answer.reason,
  ...(answer.stopLogprob && { stopLogprob: answer.stopLogprob }),
  promptTokens: request.promptTokenIds.length,
  completionTokens: answer.tokens,
  cachedTokens: 0,
  timings: script.timings?.(answer.tokens) ?? TIMINGS,
});

/** Log-probabilities that tests can predict, alternatives just below. */
const logprobOf = (tokenId: number, count: number, of = (id: number) => -id / 100): TokenLogprob => ({
  tokenId,
  logprob: of(tokenId),
  top: Array.from({ length: count }, (_, rank) => ({
    tokenId: (tokenId + rank) % 256,
    logprob: of(tokenId) - rank,
  })),
});

/** One token a byte, and two special ones. */
const byteText: TokenText = {
  toolFormat: PLAIN_FORMAT,
  tokenBytesMax: 8,
  async encode(job, { spent }) {
    const prompts =
      job.type === 'chat'
        ? [job.messages.flatMap(({ content }) => [USER_TOKEN, ...bytesOf(String(content))])]
        : job.texts.map((text) => (job.parseSpecial ? encode(text) : bytesOf(text)));
    spent.tokens = prompts.reduce((sum, { length }) => sum + length, 0);
    if (prompts.some(({ length }) => length > job.tokensMax)) return { type: 'too_long' };
    return { type: 'encoded', prompts: prompts.map((ids) => Int32Array.from(ids)) };
  },
  tokenBytes: (id) => (id < 256 ? Uint8Array.of(id) : new TextEncoder().encode(NAMES[id])),
  createDecoder({ showSpecial }) {
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
    return {
      push: (id) =>
        id < 256 ? decoder.decode(Uint8Array.of(id), { stream: true }) : showSpecial ? NAMES[id]! : '',
      flush: () => decoder.decode(),
    };
  },
};

const encode = (text: string): number[] =>
  text.split(/(<\|end\|>|<\|user\|>)/).flatMap((part) => {
    const special = Object.entries(NAMES).find(([, name]) => name === part);
    return special === undefined ? bytesOf(part) : [Number(special[0])];
  });

/** The real thing over the bytes; a script does what it says whatever the grammar allows. */
export const byteGrammars = createGrammars({
  vocabulary: {
    table: tokenTable(
      {
        model: {
          vocab: Object.fromEntries(Array.from({ length: 128 }, (_, id) => [String.fromCharCode(id), id])),
        },
      },
      Object.entries(NAMES).map(([id, content]) => ({ id: Number(id), content, special: true })),
    ),
    size: VOCABULARY,
    endTokenId: END_TOKEN,
  },
  onError: () => {},
});

export const scriptedModel = (engine: Engine): ServedModel => ({
  name: 'scripted',
  created_s: 1_700_000_000,
  engine,
  text: byteText,
  grammars: byteGrammars,
  endTokenIds: [END_TOKEN],
});
