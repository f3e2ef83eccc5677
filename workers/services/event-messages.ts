/**
 * How events travel: requests' several together, and beside them who answered them. A field in the events themselves
 * would be malformed to a worker of the release before, which consumes some of them while a deployment is gradual, and
 * all that they say would be lost; of an entry of its own, only who answered is.
 */
import {
  type AnswererEntry,
  type EdgeEvent,
  type EdgeMessage,
  type MessageEntry,
  messageEntrySchema,
  type RequestEvent,
} from '../../shared/events.ts';
import { log } from './log.ts';

/** The backend that answered, by the request's event. */
export type Answerers = ReadonlyMap<string, string>;

/**
 * Requests' events in one message. The consumer gets a hundred messages at most, and what a delivery costs it is much
 * the same however much is in it. A message holds 128 kB, and these take 0.7 kB each, 2.5 at the very most.
 */
const MESSAGE_EVENTS_MAX = 40;

export function messagesOf(events: readonly EdgeEvent[], answerers: Answerers): EdgeMessage[] {
  const requests = events.filter((event) => event.kind === 'request');
  const messages: EdgeMessage[] = events.filter((event) => event.kind !== 'request');
  for (let at = 0; at < requests.length; at += MESSAGE_EVENTS_MAX) {
    const together = requests.slice(at, at + MESSAGE_EVENTS_MAX);
    messages.push([...together, ...answererEntries(together, answerers)]);
  }
  return messages;
}

function answererEntries(requests: readonly RequestEvent[], answerers: Answerers): AnswererEntry[] {
  const byBackend = new Map<string, string[]>();
  for (const { id } of requests) {
    const backend = answerers.get(id);
    if (backend !== undefined) byBackend.set(backend, [...(byBackend.get(backend) ?? []), id]);
  }
  return [...byBackend].map(([backend, answered]) => ({ kind: 'answerer', backend, requests: answered }));
}

/** What is in a message, with a line in the log for what can't be read, now or ever. */
export function readMessage(body: unknown): { events: EdgeEvent[]; answerers: Answerers } {
  const entries = (Array.isArray(body) ? body : [body]).flatMap((entry) => readEntry(entry) ?? []);
  const beside = entries.filter((entry) => entry.kind === 'answerer');
  return {
    events: entries.filter((entry) => entry.kind !== 'answerer'),
    answerers: new Map(beside.flatMap(({ backend, requests }) => requests.map((id) => [id, backend]))),
  };
}

function readEntry(entry: unknown): MessageEntry | null {
  const parsed = messageEntrySchema.safeParse(entry);
  if (parsed.success) return parsed.data;
  log('error', 'event_malformed', { reason: parsed.error.message });
  return null;
}
