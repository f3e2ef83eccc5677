/**
 * A conversation as the one text that the model was trained on: the model's own Jinja template. Its control tokens are
 * what separates one speaker from the next, so only the template may write them. What a client wrote that reads like
 * one is text.
 */
import { Template } from '@huggingface/jinja';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { Tool } from '../../../shared/wire/openai.ts';
import { unsupportedModel } from '../model-source.ts';
import { anyOf } from './tokenizer.ts';

export type TemplateMessage = {
  readonly role: string;
  readonly content: string;
  readonly name?: string | undefined;
  readonly tool_calls?: readonly TemplateCall[];
  readonly tool_call_id?: string;
};

/** `arguments`: the object, or the text that was none. */
type TemplateCall = {
  readonly id: string;
  readonly type: 'function';
  readonly function: { readonly name: string; readonly arguments: unknown };
};

/** For models that bring no template; llama.cpp does the same. */
const CHATML_TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}" +
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

type Rendered = {
  readonly text: string;
  /** The text with other letters wherever a client's could be part of a control token. */
  readonly within: string;
};

export type ChatTemplate = {
  /** Ends where the answer begins. @throws MaskrouteError `invalid_request` when the template refuses. */
  render(messages: readonly TemplateMessage[], tools?: readonly Tool[]): string;
  /** The same, and which of it the template wrote. `control`: the texts of the tokens that only it may write. */
  renderApart(messages: readonly TemplateMessage[], tools: readonly Tool[], control: ControlTexts): Rendered;
};

/** `tokens`: the texts of BOS and EOS, which some templates write. @throws MaskrouteError `unsupported_model`. */
export function createChatTemplate(
  source: string | null,
  tokens: { readonly bos: string; readonly eos: string },
): ChatTemplate {
  const text = source ?? CHATML_TEMPLATE;
  let template: Template;
  try {
    template = new Template(text);
  } catch (error) {
    throw unsupportedModel(`its chat template cannot be parsed (${(error as Error).message})`);
  }
  const render: ChatTemplate['render'] = (messages, tools = []) => {
    try {
      return template.render({
        // Copies: a template can assign to what it is given.
        messages: structuredClone(messages),
        // Templates ask whether these are none, as they are in transformers.
        tools: tools.length === 0 ? null : structuredClone(tools),
        documents: null,
        add_generation_prompt: true,
        bos_token: tokens.bos,
        eos_token: tokens.eos,
      });
    } catch (error) {
      const reason = (error as Error).message;
      throw new MaskrouteError(
        'invalid_request',
        `The model's chat template refuses the messages: ${reason}`,
        {
          param: 'messages',
          cause: error,
        },
      );
    }
  };
  return {
    render,
    renderApart: (messages, tools, control) => renderApart(render, { messages, tools }, control, text),
  };
}

type ControlTexts = {
  /** All letters of all of them, without white space: templates trim it, and it begins and ends no such token. */
  readonly letters: ReadonlySet<string>;
  /** The control tokens of a text, the leftmost and longest first. */
  readonly pattern: RegExp;
};

export const controlTexts = (names: readonly string[]): ControlTexts => ({
  letters: new Set(names.flatMap((name) => name.split('').filter((letter) => letter.trim() !== ''))),
  pattern: anyOf(names),
});

/**
 * The clients' letters are replaced by letters that nobody uses, one by one, and the template is rendered with them:
 * control tokens in the result are its own, whatever it does to a message (trims, cuts, joins, repeats). Put back, the
 * letters must give what it renders of the messages as they are. They do not where it looks into a message, for
 * `</think>` say. Then only such letters are replaced as spell a control token in the message alone; should control
 * tokens come out of that which the full replacement did not give, the full replacement is what counts.
 */
function renderApart(
  render: ChatTemplate['render'],
  given: Given,
  control: ControlTexts,
  source: string,
): Rendered {
  const text = render(given.messages, given.tools);
  const letters = foreignLetters(control, [source, ...textsOf(given)]);
  const rendered = (replace: (text: string) => string): Rendered => {
    const messages = given.messages.map(({ role, ...others }) => ({
      role,
      ...replaced(others, replace, control),
    }));
    const within = render(messages, replaced(given.tools, replace, control));
    return { text: exchange(within, letters.back), within };
  };
  const all = rendered((given) => exchange(given, letters.there));
  if (all.text === text) return all;
  const spelled = rendered((given) =>
    given.replace(control.pattern, (name) => exchange(name, letters.there)),
  );
  const tokens = (within: string) => (within.match(control.pattern) ?? []).join('\0');
  return tokens(spelled.within) === tokens(all.within) ? spelled : all;
}

/** What a client wrote. */
type Given = { readonly messages: readonly TemplateMessage[]; readonly tools: readonly Tool[] };

function textsOf(value: unknown): string[] {
  if (typeof value === 'string') return [value];
  if (typeof value !== 'object' || value === null) return [];
  return Object.entries(value).flatMap(([name, one]) => [name, ...textsOf(one)]);
}

/** All texts in it. A template looks for names of fields, so of those only what spells a control token is replaced. */
function replaced<Value>(value: Value, replace: (text: string) => string, control: ControlTexts): Value {
  const walk = (one: unknown): unknown => {
    if (typeof one === 'string') return replace(one);
    if (typeof one !== 'object' || one === null) return one;
    if (Array.isArray(one)) return one.map(walk);
    return Object.fromEntries(
      Object.entries(one).map(([name, inner]) => [
        name.search(control.pattern) === -1 ? name : replace(name),
        walk(inner),
      ]),
    );
  };
  return walk(value) as Value;
}

type Letters = { readonly there: ReadonlyMap<string, string>; readonly back: ReadonlyMap<string, string> };

/** For private use: none of them is white space or has another case, and no template compares with one. */
const PRIVATE = { from: 0xe000, to: 0xf8ff, pattern: /[\ue000-\uf8ff]/g } as const;

/** A letter for every one of control tokens, which is in none of `texts`. @throws MaskrouteError `invalid_request`. */
function foreignLetters({ letters }: ControlTexts, texts: readonly string[]): Letters {
  const used = new Set(texts.flatMap((text) => text.match(PRIVATE.pattern) ?? []));
  const there = new Map<string, string>();
  let code: number = PRIVATE.from;
  for (const letter of letters) {
    while (used.has(String.fromCharCode(code)) || letters.has(String.fromCharCode(code))) code++;
    if (code > PRIVATE.to) {
      const message =
        'messages: they hold nearly every character for private use; none is left for this server.';
      throw new MaskrouteError('invalid_request', message, { param: 'messages' });
    }
    there.set(letter, String.fromCharCode(code++));
  }
  return { there, back: new Map([...there].map(([letter, foreign]) => [foreign, letter])) };
}

/** Code unit by code unit, so that the length stays. */
function exchange(text: string, letters: ReadonlyMap<string, string>): string {
  return text.replace(anyOf([...letters.keys()]), (letter) => letters.get(letter)!);
}
