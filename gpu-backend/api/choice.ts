/** One choice: the engine's tokens become the text events of one entry in `choices`. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { FinishReason } from '../../shared/openai.ts';
import type { Engine, EngineEvent, GenerateRequest, Timings, TokenLogprob } from '../serving/engine.ts';
import type { TokenText } from './served-model.ts';
import type { Piece, Shown } from './text-assembler.ts';
import { createTextAssembler } from './text-assembler.ts';

export type ChoiceJob = {
  /** Position in the answer's `choices`. */
  readonly index: number;
  /** Choices of one prompt share its tokens in `usage`; the first of them carries the count. */
  readonly countsPrompt: boolean;
  readonly request: GenerateRequest;
  readonly stops: readonly string[];
  /** The prompt as the answer repeats it, when it does. */
  readonly echo: string | undefined;
  /** Whether a stop token has an entry in the log-probabilities, as the legacy format has it. */
  readonly scoresStopToken: boolean;
};

/** What is known of a choice so far; kept up to date while it runs, so that an abort can be accounted for. */
export type Progress = {
  completionTokens: number;
  cachedTokens: number;
  timings: Timings | undefined;
};

export type ChoiceEvent =
  | {
      readonly type: 'text';
      readonly index: number;
      readonly text: string;
      readonly pieces: readonly Piece[];
    }
  | { readonly type: 'finished'; readonly index: number; readonly reason: FinishReason };

/**
 * @throws MaskrouteError what the engine throws, and `cancelled` when `signal` ended it. Leaving the
 * iteration early cancels the engine's request.
 */
export async function* runChoice(
  engine: Engine,
  text: TokenText,
  job: ChoiceJob,
  progress: Progress,
  signal: AbortSignal,
): AsyncGenerator<ChoiceEvent, void> {
  const own = new AbortController();
  const answer = createAnswer(text, job);
  let stopped = false;
  try {
    for await (const event of engine.generate(job.request, AbortSignal.any([signal, own.signal]))) {
      // After a stop string the engine only has to say that it stopped; tokens in between do not count.
      if (stopped && event.type !== 'finished') continue;
      const shown = answer.take(event);
      if (shown.text !== '' || shown.pieces.length > 0) {
        yield { type: 'text', index: job.index, text: shown.text, pieces: shown.pieces };
      }
      if (shown.stopped && !stopped) {
        stopped = true;
        own.abort();
      }
      if (event.type === 'token') progress.completionTokens++;
      if (event.type !== 'finished') continue;
      progress.cachedTokens = event.cachedTokens;
      progress.timings = event.timings;
      yield {
        type: 'finished',
        index: job.index,
        reason: stopped ? 'stop' : finishReason(event.reason, signal),
      };
      return;
    }
    throw new MaskrouteError('engine_failed', 'The engine ended a request without an end.');
  } finally {
    own.abort();
  }
}

function finishReason(reason: 'stop' | 'length' | 'cancelled', signal: AbortSignal): FinishReason {
  switch (reason) {
    case 'stop':
    case 'length':
      return reason;
    case 'cancelled':
      throw cancellation(signal);
  }
}

/** Why `signal` aborted, as far as a client is told. */
export const cancellation = (signal: AbortSignal): MaskrouteError =>
  signal.reason instanceof MaskrouteError
    ? signal.reason
    : new MaskrouteError('cancelled', 'The request was cancelled.');

/** The echoed prompt first, then what the assembler shows. */
function createAnswer(text: TokenText, job: ChoiceJob): { take(event: EngineEvent): Shown } {
  const assembler = createTextAssembler({
    decoder: text.createDecoder({ showSpecial: false }),
    stops: job.stops,
    minTokens: job.request.minTokens,
    offset: job.echo?.length ?? 0,
  });
  let echo = job.echo;
  let stopped = false;
  const takeBody = (event: EngineEvent): Shown => {
    switch (event.type) {
      case 'prompt':
        return { text: '', pieces: promptPieces(text, job, event.logprobs), stopped: false };
      case 'token':
        return assembler.push(event.tokenId, event.logprob);
      case 'finished':
        if (stopped) return { text: '', pieces: [], stopped };
        return assembler.finish(job.scoresStopToken ? event.stopLogprob : undefined);
    }
  };
  return {
    take(event) {
      const shown = takeBody(event);
      stopped ||= shown.stopped;
      const withEcho = { ...shown, text: (echo ?? '') + shown.text };
      echo = undefined;
      return withEcho;
    },
  };
}

/** Offsets are those of the echoed text, in which the BOS that the model wants has no place. */
function promptPieces(text: TokenText, job: ChoiceJob, logprobs: readonly (TokenLogprob | null)[]): Piece[] {
  const decoder = text.createDecoder({ showSpecial: true });
  const echo = job.echo ?? '';
  let offset = 0;
  return logprobs.map((logprob, position) => {
    const tokenId = job.request.promptTokenIds[position]!;
    const piece = { tokenId, offset, logprob };
    const decoded = decoder.push(tokenId);
    if (echo.startsWith(decoded, offset)) offset += decoded.length;
    return piece;
  });
}
