/**
 * Renders a conversation with the model's Jinja chat template. Control tokens separate the messages, so only the template
 * may write them; when a client's text spells a control token, it is encoded as plain text.
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

/** `arguments`: the parsed object, or the text when it is not a JSON object. */
type TemplateCall = {
  readonly id: string;
  readonly type: 'function';
  readonly function: { readonly name: string; readonly arguments: unknown };
};

/** The template of models without one; llama.cpp uses it, too. */
const CHATML_TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}" +
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

type Rendered = {
  readonly text: string;
  /** The text with the client's letters replaced wherever they could be part of a control token. Same length. */
  readonly within: string;
};

export type ChatTemplate = {
  /** The text up to where the answer begins. @throws MaskrouteError `invalid_request` when the template refuses. */
  render(messages: readonly TemplateMessage[], tools?: readonly Tool[]): string;
  /** Also says which control tokens the template itself wrote. `control`: the texts of control tokens. */
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
        // Copies, as a template can change its variables.
        messages: structuredClone(messages),
        // As in transformers, none when there are none: templates test that.
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
  /** The letters of all control tokens, without white space, which templates trim; no such token begins or ends with it. */
  readonly letters: ReadonlySet<string>;
  /** Matches the control tokens in a text, the leftmost and longest first. */
  readonly pattern: RegExp;
};

export const controlTexts = (names: readonly string[]): ControlTexts => ({
  letters: new Set(names.flatMap((name) => name.split('').filter((letter) => letter.trim() !== ''))),
  pattern: anyOf(names),
});

/**
 * Replaces the letters of control tokens in the client's text by unused letters, one for one, and renders the template with
 * the replaced text. Control tokens in the result are then the template's own, whatever it does to a message (trims, cuts,
 * joins, repeats). After replacing the letters back, the result must equal a plain rendering.
 *
 * It does not when the template searches a message, for example for `</think>`. Then only letters that spell a whole control
 * token inside one message are replaced. If that rendering has other control tokens than the full replacement, the full
 * replacement is used.
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

/** The client's part of a conversation. */
type Given = { readonly messages: readonly TemplateMessage[]; readonly tools: readonly Tool[] };

function textsOf(value: unknown): string[] {
  if (typeof value === 'string') return [value];
  if (typeof value !== 'object' || value === null) return [];
  return Object.entries(value).flatMap(([name, one]) => [name, ...textsOf(one)]);
}

/** Applies `replace` to all strings in `value`. Templates search for field names, so only names with control tokens change. */
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

/** Unicode's private use area: no white space, no upper and lower case, and no template compares with these letters. */
const PRIVATE = { from: 0xe000, to: 0xf8ff, pattern: /[\ue000-\uf8ff]/g } as const;

/** A private letter, not used in `texts`, for each letter of control tokens. @throws MaskrouteError `invalid_request`. */
function foreignLetters({ letters }: ControlTexts, texts: readonly string[]): Letters {
  const used = new Set(texts.flatMap((text) => text.match(PRIVATE.pattern) ?? []));
  const there = new Map<string, string>();
  let code: number = PRIVATE.from;
  for (const letter of letters) {
    while (used.has(String.fromCharCode(code)) || letters.has(String.fromCharCode(code))) code++;
    if (code > PRIVATE.to) {
      const message =
        'messages: they use nearly all private use characters of Unicode; none is left for this server.';
      throw new MaskrouteError('invalid_request', message, { param: 'messages' });
    }
    there.set(letter, String.fromCharCode(code++));
  }
  return { there, back: new Map([...there].map(([letter, foreign]) => [foreign, letter])) };
}

/** Replaces code unit by code unit, which keeps the length. */
function exchange(text: string, letters: ReadonlyMap<string, string>): string {
  return text.replace(anyOf([...letters.keys()]), (letter) => letters.get(letter)!);
}
