/**
 * The format of a model's tool calls in text. If its chat template supports tools, the format is found by rendering a
 * conversation with a call. For every other template, tools, calls and results are written into plain messages, in the
 * format of Hermes, which most models have seen in training:
 *
 *     <tool_call>
 *     {"name": "weather", "arguments": {"city": "Paris"}}
 *     </tool_call>
 */
import { type ChatMessage, messageText, type Tool, type ToolCall } from '../../../shared/wire/openai.ts';
import { isNestedWithin } from '../../../shared/wire/parse-body.ts';
import type { ChatTemplate, TemplateMessage } from './chat-template.ts';

/** A call is the text `begin`, the tool's name, `middle`, the arguments as JSON, and `end`. */
export type ToolFormat = {
  readonly begin: string;
  readonly middle: string;
  readonly end: string;
  /** The text that marks the beginning of a call; `begin` starts with it. */
  readonly trigger: string;
  readonly separator: string;
  /** Whether a message has at most one call. */
  readonly isSingle: boolean;
  /** Whether the template writes tools, calls and results itself. */
  readonly isOwn: boolean;
};

export const PLAIN_FORMAT: ToolFormat = {
  begin: '<tool_call>\n{"name": "',
  middle: '", "arguments": ',
  end: '}\n</tool_call>',
  trigger: '<tool_call>',
  separator: '\n',
  isSingle: false,
  isOwn: false,
};

const PROBE_TOOL: Tool = {
  type: 'function',
  function: {
    name: 'probe_tool',
    description: 'probe_description',
    parameters: { type: 'object', properties: { probe_key: { type: 'string' } } },
  },
};
const user: TemplateMessage = { role: 'user', content: 'probe_question' };
const probeCall = (id: string) => ({
  id,
  type: 'function' as const,
  function: { name: 'probe_tool', arguments: { probe_key: 'probe_value' } },
});
/** Nine letters, as Mistral's template requires. */
const PROBE_IDS = ['probecall', 'othercall'] as const;
const answer = (ids: readonly string[]): TemplateMessage[] => [
  user,
  { role: 'assistant', content: '', tool_calls: ids.map(probeCall) },
  ...ids.map((id) => ({ role: 'tool', content: 'probe_result', tool_call_id: id, name: 'probe_tool' })),
];

export function toolFormatOf(template: ChatTemplate): ToolFormat {
  const render = (messages: readonly TemplateMessage[], tools?: readonly Tool[]): string => {
    try {
      return template.render(messages, tools);
    } catch {
      return '';
    }
  };
  const told = render([user], [PROBE_TOOL]);
  const called = render(answer([PROBE_IDS[0]]), [PROBE_TOOL]);
  const isKnown = ['probe_tool', 'probe_description', 'probe_key'].every((word) => told.includes(word));
  const call = CALL.exec(called);
  if (!isKnown || call === null || !called.includes('probe_result')) return PLAIN_FORMAT;
  const [whole, before, , middle] = call;
  const end = called.slice(call.index + whole.length).match(/^\s*\}(?:\s*<\/tool_call>)?/)?.[0];
  if (end === undefined) return PLAIN_FORMAT;
  return {
    begin: `${before}{"name": "`,
    middle: middle!,
    end,
    trigger: before === '' ? '{"name": "' : before!.trimEnd(),
    separator: '\n',
    isSingle: render(answer(PROBE_IDS), [PROBE_TOOL]) === '',
    isOwn: true,
  };
}

/** A call in JSON, with or without Hermes' tag: the formats that a grammar supports. */
const CALL =
  /((?:<tool_call>\s*)?)(\{"name": "probe_tool)(", "(?:arguments|parameters)": )\{"probe_key": "probe_value"\}/;

/** A conversation for the template, with tools in the template's own format or in plain messages. */
export function templateMessages(
  messages: readonly ChatMessage[],
  tools: readonly Tool[],
  format: ToolFormat,
): TemplateMessage[] {
  if (format.isOwn) return messages.map(ownMessage);
  const plain: TemplateMessage[] = [];
  for (const message of messages) {
    const one = plainMessage(message, format);
    const last = plain.at(-1);
    // Results of one message's calls become one message.
    const isNext = message.role === 'tool' && last?.content.startsWith(RESULT) === true;
    if (isNext) plain[plain.length - 1] = { ...last!, content: `${last!.content}\n${one.content}` };
    else plain.push(one);
  }
  return tools.length === 0 ? plain : withSystem(plain, toolsText(tools, format));
}

function ownMessage(message: ChatMessage): TemplateMessage {
  const { role, name, tool_call_id, tool_calls } = message;
  return {
    role,
    content: messageText(message),
    ...(name == null ? {} : { name }),
    ...(tool_call_id == null ? {} : { tool_call_id }),
    ...(tool_calls == null || tool_calls.length === 0 ? {} : { tool_calls: tool_calls.map(ownCall) }),
  };
}

/** Arguments are parsed, as templates write the JSON themselves. */
const ownCall = ({ id, function: { name, arguments: json } }: ToolCall) => ({
  id,
  type: 'function' as const,
  function: { name, arguments: parsed(json) },
});

const DEPTH_MAX = 32;
function parsed(json: string): unknown {
  try {
    const value = JSON.parse(json);
    return isNestedWithin(value, DEPTH_MAX) ? value : json;
  } catch {
    return json;
  }
}

const RESULT = '<tool_response>\n';

function plainMessage(message: ChatMessage, { begin, middle, end }: ToolFormat): TemplateMessage {
  const content = messageText(message);
  const name = message.name == null ? {} : { name: message.name };
  if (message.role === 'tool') return { role: 'user', content: `${RESULT}${content}\n</tool_response>` };
  const calls = (message.tool_calls ?? []).map(
    ({ function: called }) => `${begin}${called.name}${middle}${called.arguments}${end}`,
  );
  const parts = content === '' ? calls : [content, ...calls];
  return { role: message.role, content: parts.join('\n'), ...name };
}

function withSystem(messages: readonly TemplateMessage[], text: string): TemplateMessage[] {
  const [first, ...rest] = messages;
  return first?.role === 'system'
    ? [{ ...first, content: `${first.content}\n\n${text}` }, ...rest]
    : [{ role: 'system', content: text }, ...messages];
}

/** The description of tools for a template without support for them; docs/tools.md shows it. */
function toolsText(tools: readonly Tool[], { begin, middle, end }: ToolFormat): string {
  return [
    'You can call these functions:',
    '<tools>',
    ...tools.map(({ function: { name, description, parameters } }) =>
      JSON.stringify({ name, description: description ?? undefined, parameters: parameters ?? undefined }),
    ),
    '</tools>',
    'To call a function, answer with its name and its arguments as JSON, and with nothing else:',
    `${begin}function-name${middle}{"argument": "value"}${end}`,
    'The results come in the next message. When no function helps, answer in plain words.',
  ].join('\n');
}
