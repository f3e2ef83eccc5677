/** What is to be answered, and what is being answered: the data between planning, running and accounting. */
import type { RouteEcho } from '../../shared/protocol.ts';
import type { ChoiceEvent, ChoiceJob, Progress } from './choice.ts';
import type { ChosenMask } from './mask-choice.ts';
import type { Wire } from './wire.ts';

/** A checked request, ready to run. */
export type AnswerPlan = {
  readonly requestId: string;
  /** The edge's name for the completion. */
  readonly completion: string | undefined;
  /** As the client wrote it. */
  readonly modelName: string;
  readonly mask: ChosenMask;
  /** The edge's decision; empty on a direct call. */
  readonly route: RouteEcho;
  readonly wire: Wire;
  readonly jobs: readonly ChoiceJob[];
  readonly withLogprobs: boolean;
  readonly stream: boolean;
  readonly includeUsage: boolean;
};

/** A plan that runs. `progress` is current at any time, also after an abort. */
export type RunningAnswer = {
  readonly plan: AnswerPlan;
  readonly progress: readonly Progress[];
  readonly events: AsyncGenerator<ChoiceEvent, void>;
};
