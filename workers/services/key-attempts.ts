/**
 * Guessing administrators' keys, bounded: of one address, and of all together. A key is looked at only after its
 * attempt was counted, and not at all when there were too many, so that being refused tells nothing about it.
 */
import { MaskrouteError } from '../../shared/errors.ts';
import type { AttemptAnswer } from '../attempts/attempt-book.ts';
import type { KeyAttempts } from '../attempts/key-attempts.ts';
import { KEY_ATTEMPTS, RETRY_AFTER_s } from '../limits.ts';
import { type Hold, withDeadline } from './deadline.ts';
import { log, reasonOf } from './log.ts';

export interface AttemptGuard {
  /**
   * What `check` gives, when it may be asked.
   * @throws MaskrouteError `too_many_attempts`, `configuration_unavailable` when nobody can count, and what `check`
   * throws.
   */
  guard<T>(address: string | undefined, hold: Hold, check: () => Promise<T>): Promise<T>;
}

/** What says that a key is wrong, or right for another door; everything else says nothing about it. */
const WRONG: readonly string[] = ['invalid_api_key', 'forbidden'];
/** Every local client, and what reaches the worker without Cloudflare's header. */
const LOCAL = 'local';

export function createAttemptGuard(
  objects: Pick<DurableObjectNamespace<KeyAttempts>, 'idFromName' | 'get'>,
): AttemptGuard {
  /** Addresses whose last key was right, as far as this isolate saw: they need not wait for the count. */
  const right = new Set<string>();
  /** The attempt of an address that others of it wait for. */
  const underway = new Map<string, Promise<void>>();

  const ask = async <T>(question: (object: DurableObjectStub<KeyAttempts>) => Promise<T>): Promise<T> =>
    await withDeadline(
      question(objects.get(objects.idFromName('all'))),
      KEY_ATTEMPTS.wait_ms,
      'counting attempts',
    );

  const begin = async (address: string): Promise<number> => {
    const answer = await ask(async (object) => (await object.begin(address)) as AttemptAnswer).catch(
      (error) => {
        log('error', 'attempts_unreachable', { reason: reasonOf(error) });
        throw new MaskrouteError('configuration_unavailable', 'Keys cannot be checked right now.', {
          retryAfter_s: RETRY_AFTER_s,
          cause: error,
        });
      },
    );
    if (answer.allowed) return answer.attempt;
    log('warn', 'too_many_attempts', { address });
    const retryAfter_s = Math.ceil(answer.retryAfter_ms / 1000);
    throw new MaskrouteError('too_many_attempts', `Too many wrong keys: wait ${retryAfter_s} s.`, {
      retryAfter_s,
    });
  };
  const settle = (hold: Hold, question: (object: DurableObjectStub<KeyAttempts>) => Promise<void>): void =>
    hold(ask(question).catch((error) => log('warn', 'attempt_not_settled', { reason: reasonOf(error) })));

  /** Counts only what was wrong. */
  const trusted = async <T>(address: string, check: () => Promise<T>): Promise<T> => {
    try {
      return await check();
    } catch (error) {
      if (!isWrong(error)) throw error;
      right.delete(address);
      await begin(address);
      throw error;
    }
  };
  /** Counts before it looks, and takes back what was right or said nothing. */
  const counted = async <T>(address: string, hold: Hold, check: () => Promise<T>): Promise<T> => {
    const attempt = await begin(address);
    try {
      const result = await check();
      if (right.size < KEY_ATTEMPTS.knownMax) right.add(address);
      settle(hold, async (object) => await object.succeeded(attempt));
      return result;
    } catch (error) {
      if (!isWrong(error)) settle(hold, async (object) => await object.forget(attempt));
      throw error;
    }
  };

  return {
    async guard(header, hold, check) {
      const address = header === undefined ? LOCAL : addressGroup(header);
      // Many at once with the right key are one attempt: the others wait for what the first one says. Its request may be
      // torn down meanwhile, and then nobody says anything.
      const before = underway.get(address);
      if (before !== undefined)
        await withDeadline(before, KEY_ATTEMPTS.wait_ms, 'an attempt').catch(() => {});
      if (right.has(address)) return await trusted(address, check);
      const attempt = counted(address, hold, check);
      const ended = attempt.then(
        () => {},
        () => {},
      );
      underway.set(address, ended);
      try {
        return await attempt;
      } finally {
        if (underway.get(address) === ended) underway.delete(address);
      }
    },
  };
}

const isWrong = (error: unknown): boolean => error instanceof MaskrouteError && WRONG.includes(error.code);

const GROUPS_OF_A_NETWORK = 4;
const GROUPS = 8;

/** An IPv6 customer has a network of 2^64 addresses, so its network is what counts. */
export function addressGroup(address: string): string {
  if (!address.includes(':')) return address;
  const [head = '', tail] = address.toLowerCase().split('::');
  const groups = (text: string) => text.split(':').filter((group) => group !== '');
  const [before, after] = [groups(head), groups(tail ?? '')];
  const zeros = Array<string>(Math.max(0, GROUPS - before.length - after.length)).fill('0');
  return [...before, ...zeros, ...after]
    .slice(0, GROUPS_OF_A_NETWORK)
    .map((group) => group.replace(/^0+(?=.)/, ''))
    .join(':');
}
