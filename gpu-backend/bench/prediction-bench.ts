/**
 * `bench prediction`: ms/token of an answer that repeats a text of its prompt, when its client predicts this text, the text with
 * other words in it, or something else, and when the backend looks it up in the prompt, against the same answer without a
 * prediction. Prompt lookup is measured with a sampled answer, too, which repeats neither its prompt nor itself.
 *
 * The limit: a step of a draft reads the weights once for up to 16 tokens, so it costs a token, and the products of the other
 * rows.
 */
import { denseMask } from '../../shared/mask/mask.ts';
import { type GenerateRequest, PLAIN_SAMPLING, type PredictedTokens } from '../engine/engine.ts';
import { interleaved, round, type Subject } from '../measure.ts';
import { openInstalled } from '../model/store.ts';
import { type ModelText, openModelText } from '../model/tokenizer/model-text.ts';
import { NEVER, openOurs, requestOf } from './batch.ts';
import type { DecodeOptions } from './decode.ts';

const TEXT =
  `The harbour wakes before the town does. At four in the morning the first boats come back, low in the water, and the
gulls follow them in a loud white cloud. Men in yellow coats throw ropes to boys who are hardly awake, and the boys tie them to
iron rings that were old when their grandfathers were young. Boxes of ice and silver fish are lifted out by hand, one after the
other, and stand in long rows under the lamps. A woman with a notebook walks along the rows, counts the boxes, and says a price
for each. Nobody argues with her. By six the boxes are gone, the stones are washed, and the cats lie in the sun as if nothing
had happened.`.replaceAll('\n', ' ');
const REPEAT = `Repeat this text, word for word:\n\n${TEXT}`;
const TELL = 'Tell me in a long text how a harbour wakes in the morning, and who works there.';
const OTHER_TEXT = 'Nothing of this is what the answer says. '.repeat(20);
/** In the text that is predicted with mistakes. */
const WRONG_EVERY_WORDS = 20;
const ANSWER_TOKENS_MAX = 220;

type Answer = {
  readonly msPerToken: number;
  readonly tokens: number;
  readonly predicted: PredictedTokens | undefined;
};

type Ours = Awaited<ReturnType<typeof openOurs>>;

/** What one answer is asked of, and how. */
type Asked = { readonly by: Ours; readonly prompt: string; readonly prediction?: string | undefined };

export async function benchPrediction({ home, model, rounds, say, signal }: DecodeOptions): Promise<object> {
  await using ours = await openOurs(home, { model });
  await using looking = await openOurs(home, { model, promptLookup: true });
  const { folder, manifest } = await openInstalled(home, model);
  const text = await openModelText(folder, manifest);
  const nearly = TEXT.split(' ').map((word, i) => (i % WRONG_EVERY_WORDS === 0 ? 'another' : word));
  const last = new Map<string, Answer>();
  const subject = (name: string, asked: Partial<Asked> = {}): Subject => ({
    name,
    async measure() {
      const found = await answer(text, manifest.eosTokenIds, { by: ours, prompt: REPEAT, ...asked });
      last.set(name, found);
      return found.msPerToken;
    },
  });
  const subjects = {
    plain: subject('without a prediction'),
    predicted: subject('predicted', { prediction: TEXT }),
    mistaken: subject(`predicted with another word for every ${WRONG_EVERY_WORDS}th`, {
      prediction: nearly.join(' '),
    }),
    wrong: subject('predicted wrongly', { prediction: OTHER_TEXT }),
    lookedUp: subject('looked up in the prompt', { by: looking }),
    plainTale: subject('a tale', { prompt: TELL }),
    lookedUpTale: subject('a tale, looked up in its prompt', { by: looking, prompt: TELL }),
  };
  const found = await interleaved(Object.values(subjects), rounds, signal);
  for (const [name, ms] of found) {
    const { tokens, predicted } = last.get(name)!;
    const of =
      predicted === undefined ? '' : `, ${predicted.accepted} accepted and ${predicted.rejected} rejected`;
    say(`${name}: ${ms.toFixed(2)} ms/token, ${tokens} tokens${of}`);
  }
  const ms = (which: keyof typeof subjects) => found.get(subjects[which].name)!;
  const names = Object.keys(subjects) as (keyof typeof subjects)[];
  return {
    bench: 'prediction',
    model: ours.name,
    weights: ours.weights,
    rounds,
    answerTokens: last.get(subjects.plain.name)!.tokens,
    ...Object.fromEntries(names.map((which) => [`${which}_ms`, round(ms(which))])),
    timesPredicted: round(ms('plain') / ms('predicted')),
    timesMistaken: round(ms('plain') / ms('mistaken')),
    timesWrong: round(ms('plain') / ms('wrong')),
    timesLookedUp: round(ms('plain') / ms('lookedUp')),
    timesLookedUpTale: round(ms('plainTale') / ms('lookedUpTale')),
  };
}

/** Greedy, but a tale is sampled. */
async function answer(
  text: ModelText,
  stopTokenIds: readonly number[],
  { by: { engine, config }, prompt, prediction }: Asked,
): Promise<Answer> {
  const tokenIds = text.encodeChat([{ role: 'user', content: prompt }]);
  const request: GenerateRequest = {
    ...requestOf(tokenIds, denseMask(2 * config.layerCount), ANSWER_TOKENS_MAX),
    sampling: { ...PLAIN_SAMPLING, temperature: prompt === TELL ? 1 : 0, seed: 1 },
    stopTokenIds,
    predictedTokenIds:
      prediction === undefined ? undefined : text.encodePrompt(prediction, { addSpecial: false }),
  };
  for await (const event of engine.generate(request, NEVER)) {
    if (event.type !== 'finished') continue;
    const { completionTokens: tokens, timings, predicted } = event;
    return { tokens, msPerToken: timings.decode_ms / tokens, predicted };
  }
  throw new Error('the answer did not end');
}
