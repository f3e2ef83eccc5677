import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import {
  createChatTemplate,
  type TemplateMessage,
} from '../../../../gpu-backend/model/tokenizer/chat-template.ts';
import type { Tool } from '../../../../shared/wire/openai.ts';

type Figures = {
  name: string;
  template: string;
  bos: string;
  eos: string;
  cases: { name: string; messages: TemplateMessage[]; tools: Tool[]; text: string }[];
};
/** Rendered by transformers. */
const figures: Figures[] = JSON.parse(
  readFileSync(new URL('fixtures/templates.json', import.meta.url), 'utf8'),
);

const tokens = { bos: '<s>', eos: '</s>' };
const hi = [{ role: 'user', content: 'Hi {{ 1 + 1 }}' }];

describe('createChatTemplate', () => {
  test('without a template it writes ChatML, and never evaluates a message', () => {
    expect(createChatTemplate(null, tokens).render(hi)).toBe(
      '<|im_start|>user\nHi {{ 1 + 1 }}<|im_end|>\n<|im_start|>assistant\n',
    );
  });

  test('knows BOS and EOS and trims blocks as transformers does', () => {
    const source = [
      '{{ bos_token }}',
      '{% for message in messages %}',
      "  {% if message.role == 'user' %}",
      '[INST] {{ message.content | trim }} [/INST]',
      '  {% else %}',
      '{{ message.content }}{{ eos_token }}',
      '  {% endif %}',
      '{% endfor %}',
    ].join('\n');
    const messages = [...hi, { role: 'assistant', content: 'Yes' }];
    expect(createChatTemplate(source, tokens).render(messages)).toBe(
      '<s>\n[INST] Hi {{ 1 + 1 }} [/INST]\nYes</s>\n',
    );
  });

  test('without tools or documents there are none, as transformers says it', () => {
    const source =
      '{% if tools is not none %}{% for tool in tools %}T{% endfor %}{% endif %}' +
      '{% if documents is none %}{{ messages[0].content }}{% endif %}';
    expect(createChatTemplate(source, tokens).render(hi)).toBe('Hi {{ 1 + 1 }}');
  });

  test('writes dates, indented JSON and questions about what nobody gave, as Granite’s template has them', () => {
    const source =
      "{{ strftime_now('%B %d, %Y') }}|{{ tools | tojson(indent=4) }}|" +
      "{% if 'citations' in controls and documents %}A{% elif thinking %}B{% else %}C{% endif %}";
    const date = new Intl.DateTimeFormat('en-US', { month: 'long', day: '2-digit', year: 'numeric' });
    const tool: Tool = { type: 'function', function: { name: 'now' } };
    expect(createChatTemplate(source, tokens).render(hi, [tool])).toBe(
      `${date.format(new Date())}|${JSON.stringify([tool], null, 4)}|C`,
    );
  });

  test('a refusal by the template is the client’s error, with the template’s words', () => {
    const template = createChatTemplate("{{ raise_exception('roles must alternate') }}", tokens);
    expect(() => template.render(hi)).toThrowError(
      expect.objectContaining({
        code: 'invalid_request',
        status: 400,
        message: expect.stringContaining('roles must alternate'),
      }),
    );
  });

  test('one that cannot be parsed is refused', () => {
    expect(() => createChatTemplate('{% if %}', tokens)).toThrowError(
      expect.objectContaining({ code: 'unsupported_model' }),
    );
  });

  test('a template cannot change the messages of the next request', () => {
    const template = createChatTemplate('{{ messages.pop() }}{{ messages | length }}', tokens);
    const before = structuredClone(hi);
    try {
      template.render(hi);
    } catch {
      // Whether `pop` exists is the library's matter.
    }
    expect(hi).toEqual(before);
  });
});

describe.each(figures)('the template of $name', ({ template, bos, eos, cases }) => {
  const made = createChatTemplate(template, { bos, eos });

  test.each(cases)('$name is rendered as transformers does', ({ messages, tools, text }) => {
    expect(made.render(messages, tools)).toBe(text);
  });
});
