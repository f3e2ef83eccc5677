/**
 * Prompts and answers of tenants that have them kept, for as many days as they said: to be read beside their request.
 * They are written behind the answer, and what cannot be written is a line in the log.
 */
import { messageText } from '../../shared/wire/openai.ts';
import { log, reasonOf } from '../base/log.ts';
import type { Database } from '../db/d1.ts';
import { insertTexts } from '../db/request-rows.ts';
import { TEXT_BYTES_MAX } from '../limits.ts';
import type { RoutableBody } from '../routing/decision.ts';
import type { Account } from './admission.ts';
import { join } from './answer-figures.ts';

/** The beginning of an answer's bytes, as they passed: events cost more bytes than the text in them. */
export class AnswerBytes {
  readonly #pieces: Uint8Array[] = [];
  #bytes = 0;

  add(piece: Uint8Array): void {
    if (this.#bytes >= EVENT_BYTES_MAX) return;
    this.#pieces.push(piece);
    this.#bytes += piece.length;
  }

  text(): string {
    return utf8.decode(join(this.#pieces));
  }
}

const EVENT_BYTES_MAX = 32 * TEXT_BYTES_MAX;
const utf8 = new TextDecoder();
const DAY_ms = 86_400_000;

/** Never rejects. */
export async function keepTexts(db: Database, account: Account, answer: AnswerBytes): Promise<void> {
  const { event, caller, routable } = account;
  const row = {
    event,
    tenant: caller.tenant,
    expiresAt_ms: Date.now() + (caller.policy.textsKept_days ?? 0) * DAY_ms,
    prompt: promptOf(routable).slice(0, TEXT_BYTES_MAX),
    answer: answerOf(answer.text()).slice(0, TEXT_BYTES_MAX),
  };
  await insertTexts(db, row).catch((error) => {
    log('error', 'texts_not_kept', { request_event: event, reason: reasonOf(error) });
  });
}

function promptOf(routable: RoutableBody): string {
  if (routable.kind === 'chat') {
    return routable.body.messages.map((message) => `${message.role}: ${messageText(message)}`).join('\n');
  }
  const { prompt } = routable.body;
  return typeof prompt === 'string' ? prompt : JSON.stringify(prompt);
}

/** Of a stream's events or of a whole answer, the first choice's text. What is neither is kept as it came. */
function answerOf(wire: string): string {
  const lines = wire.split('\n').filter((line) => line.startsWith('data: {'));
  const chunks = lines.length === 0 ? [wire] : lines.map((line) => line.slice('data: '.length));
  return chunks.map(textIn).join('');
}

type Choice = { message?: { content?: unknown }; delta?: { content?: unknown }; text?: unknown };
/** On the newer wire: what a whole answer has, and what an event of a stream adds. */
type Response = {
  object?: unknown;
  output?: { content?: { text?: unknown }[] }[];
  type?: unknown;
  delta?: unknown;
};

function textIn(json: string): string {
  let parsed: { choices?: Choice[] } & Response;
  try {
    parsed = JSON.parse(json);
  } catch {
    // The last event of an answer that was cut.
    return '';
  }
  if (parsed.object === 'response') {
    const parts = (parsed.output ?? []).flatMap(({ content }) => content ?? []);
    return parts.map(({ text }) => (typeof text === 'string' ? text : '')).join('');
  }
  if (parsed.type === 'response.output_text.delta') {
    return typeof parsed.delta === 'string' ? parsed.delta : '';
  }
  const [choice] = parsed.choices ?? [];
  const text = choice?.delta?.content ?? choice?.message?.content ?? choice?.text;
  return typeof text === 'string' ? text : '';
}
