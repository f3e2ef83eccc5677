/** Calls of tools in the text of an answer: what stands around them is taken away, and their arguments come as they are written. */
import { randomUUID } from 'node:crypto';
import type { ToolFormat } from '../model/tokenizer/tool-format.ts';
import type { ChoiceEvent } from './choice.ts';

/** The events of a choice that may call tools. A log-probability stays with the text that it stands for; calls have none. */
export async function* readCalls(
  events: AsyncGenerator<ChoiceEvent, void>,
  format: ToolFormat,
): AsyncGenerator<ChoiceEvent, void> {
  const reader = new CallReader(format);
  for await (const event of events) {
    const { index } = event;
    if (event.type === 'text') {
      let { pieces } = event;
      for (const part of reader.push(event.text)) {
        if (part.type !== 'text') yield { ...part, index };
        else {
          yield { ...part, index, pieces };
          pieces = [];
        }
      }
    } else if (event.type === 'finished') {
      for (const part of reader.flush()) yield { ...part, index, pieces: [] };
      const hasCalled = reader.calls > 0 && event.reason === 'stop';
      yield hasCalled ? { ...event, reason: 'tool_calls' } : event;
    } else yield event;
  }
}

type TextPart = { readonly type: 'text'; readonly text: string };
type Part =
  | TextPart
  | { readonly type: 'call'; readonly call: number; readonly id: string; readonly name: string }
  | { readonly type: 'arguments'; readonly call: number; readonly text: string };

/** The grammar has kept the form of each call, so nothing here has to be doubted. */
export class CallReader {
  /** How many have begun. */
  calls = 0;
  readonly #format: ToolFormat;
  #state: 'text' | 'name' | 'arguments' | 'end' = 'text';
  #held = '';
  #depth = 0;
  #isInString = false;
  #isEscaped = false;

  constructor(format: ToolFormat) {
    this.#format = format;
  }

  push(text: string): Part[] {
    this.#held += text;
    const parts: Part[] = [];
    for (let part = this.#next(); part !== undefined; part = this.#next()) parts.push(...part);
    return parts;
  }

  /** What was held back, when nothing follows. */
  flush(): TextPart[] {
    const text = this.#held;
    const isText = this.#state === 'text' && (this.calls === 0 || text.trim() !== '');
    this.#held = '';
    return isText && text !== '' ? [{ type: 'text', text }] : [];
  }

  /** Undefined: more text is needed. */
  #next(): Part[] | undefined {
    switch (this.#state) {
      case 'text':
        return this.#readText();
      case 'name':
        return this.#readName();
      case 'arguments':
        return this.#readArguments();
      case 'end':
        return this.#readEnd();
    }
  }

  #readText(): Part[] | undefined {
    const { begin } = this.#format;
    const at = this.#held.indexOf(begin);
    if (at >= 0) {
      const text = this.#held.slice(0, at).trimEnd();
      this.#held = this.#held.slice(at + begin.length);
      this.#state = 'name';
      return text === '' ? [] : [{ type: 'text', text }];
    }
    const shown = this.#held.length - heldBack(this.#held, begin);
    if (shown === 0) return undefined;
    const text = this.#held.slice(0, shown);
    this.#held = this.#held.slice(shown);
    return [{ type: 'text', text }];
  }

  #readName(): Part[] | undefined {
    const { middle } = this.#format;
    const end = this.#held.indexOf('"');
    if (end < 0 || this.#held.length < end + middle.length) return undefined;
    const name = this.#held.slice(0, end);
    this.#held = this.#held.slice(end + middle.length);
    this.#state = 'arguments';
    const id = `call_${randomUUID().replaceAll('-', '').slice(0, 24)}`;
    return [{ type: 'call', call: this.calls++, id, name }];
  }

  #readArguments(): Part[] | undefined {
    const end = this.#endOfObject();
    const text = this.#held.slice(0, end);
    this.#held = this.#held.slice(text.length);
    if (end !== undefined) this.#state = 'end';
    return text === '' ? undefined : [{ type: 'arguments', call: this.calls - 1, text }];
  }

  /** Where the arguments end, if they do in what is held; all of it is looked at once. */
  #endOfObject(): number | undefined {
    for (let at = 0; at < this.#held.length; at++) {
      const letter = this.#held[at];
      if (this.#isEscaped) this.#isEscaped = false;
      else if (this.#isInString) {
        if (letter === '\\') this.#isEscaped = true;
        else if (letter === '"') this.#isInString = false;
      } else if (letter === '"') this.#isInString = true;
      else if (letter === '{' || letter === '[') this.#depth++;
      else if ((letter === '}' || letter === ']') && --this.#depth === 0) return at + 1;
    }
    return undefined;
  }

  #readEnd(): Part[] | undefined {
    const { end } = this.#format;
    if (this.#held.length < end.length) return undefined;
    this.#held = this.#held.slice(end.length);
    this.#state = 'text';
    return [];
  }
}

/** The length of the end of `text` that could still become a call: the beginning of one, and white space before it. */
function heldBack(text: string, begin: string): number {
  let length = Math.min(begin.length - 1, text.length);
  while (length > 0 && !begin.startsWith(text.slice(text.length - length))) length--;
  const before = text.slice(0, text.length - length);
  return length + (before.length - before.trimEnd().length);
}
