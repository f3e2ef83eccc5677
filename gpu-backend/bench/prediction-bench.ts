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
import { interleaved, round } from '../measure.ts';
import { openInstalled } from '../model/store.ts';
import { openModelText } from '../model/tokenizer/model-text.ts';
import { openOurs } from './batch.ts';
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
const NEVER = new AbortController().signal;

type Answer = {
  readonly msPerToken: number;
  readonly tokens: number;
  readonly predicted: PredictedTokens | undefined;
};

export async function benchPrediction({ home, model, rounds, say, signal }: DecodeOptions): Promise<object> {
  await using ours = await openOurs(home, { model });
  await using looking = await openOurs(home, { model, promptLookup: true });
  const { folder, manifest } = await openInstalled(home, model);
  const text = await openModelText(folder, manifest);
  let count = 0;
  const answer = async ({ engine }: Pick<typeof ours, 'engine'>, content: string, prediction?: string) => {
    const request: GenerateRequest = {
      requestId: `bench-${count++}`,
      tenant: 'bench',
      promptTokenIds: text.encodeChat([{ role: 'user', content }]),
      plan: { mask: denseMask(2 * ours.config.layerCount), kv: 'preserve' },
      sampling: { ...PLAIN_SAMPLING, temperature: content === TELL ? 1 : 0, seed: 1 },
      maxTokens: ANSWER_TOKENS_MAX,
      minTokens: 0,
      stopTokenIds: manifest.eosTokenIds,
      logprobs: undefined,
      promptLogprobs: undefined,
      predictedTokenIds:
        prediction === undefined ? undefined : text.encodePrompt(prediction, { addSpecial: false }),
    };
    for await (const event of engine.generate(request, NEVER)) {
      if (event.type !== 'finished') continue;
      const { completionTokens: tokens, timings, predicted } = event;
      return { tokens, msPerToken: timings.decode_ms / tokens, predicted } satisfies Answer;
    }
    throw new Error('the answer did not end');
  };
  const nearly = TEXT.split(' ').map((word, i) => (i % WRONG_EVERY_WORDS === 0 ? 'another' : word));
  const last = new Map<string, Answer>();
  const subject = (name: string, prediction?: string, by = ours, prompt = REPEAT) => ({
    name,
    async measure() {
      const found = await answer(by, prompt, prediction);
      last.set(name, found);
      return found.msPerToken;
    },
  });
  const [plain, right, mistaken, wrong, lookedUp, plainTale, lookedUpTale] = [
    subject('without a prediction'),
    subject('predicted', TEXT),
    subject(`predicted with another word for every ${WRONG_EVERY_WORDS}th`, nearly.join(' ')),
    subject('predicted wrongly', OTHER_TEXT),
    subject('looked up in the prompt', undefined, looking),
    subject('a tale', undefined, ours, TELL),
    subject('a tale, looked up in its prompt', undefined, looking, TELL),
  ];
  const all = [plain, right, mistaken, wrong, lookedUp, plainTale, lookedUpTale];
  const found = await interleaved(all, rounds, signal);
  for (const [name, ms] of found) {
    const { tokens, predicted } = last.get(name)!;
    const of =
      predicted === undefined ? '' : `, ${predicted.accepted} accepted and ${predicted.rejected} rejected`;
    say(`${name}: ${ms.toFixed(2)} ms/token, ${tokens} tokens${of}`);
  }
  const ms = ({ name }: { readonly name: string }) => found.get(name)!;
  return {
    bench: 'prediction',
    model: ours.name,
    weights: ours.weights,
    rounds,
    answerTokens: last.get(plain.name)!.tokens,
    plain_ms: round(ms(plain)),
    predicted_ms: round(ms(right)),
    mistaken_ms: round(ms(mistaken)),
    wrong_ms: round(ms(wrong)),
    lookedUp_ms: round(ms(lookedUp)),
    plainTale_ms: round(ms(plainTale)),
    lookedUpTale_ms: round(ms(lookedUpTale)),
    timesPredicted: round(ms(plain) / ms(right)),
    timesMistaken: round(ms(plain) / ms(mistaken)),
    timesWrong: round(ms(plain) / ms(wrong)),
    timesLookedUp: round(ms(plain) / ms(lookedUp)),
    timesLookedUpTale: round(ms(plainTale) / ms(lookedUpTale)),
  };
}
