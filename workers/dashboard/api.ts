/**
 * The page's client for the edge: requests have the session's cookie, changes also its CSRF token, and answers are
 * parsed by the schemas that the edge uses.
 */
import { z } from 'zod';
import { CSRF_HEADER, type Session, SIGN_IN_HEADER, sessionSchema } from '../../shared/admin/admin-wire.ts';
import { check } from '../../shared/wire/parse-body.ts';

export class ApiError extends Error {
  readonly status: number;
  readonly code: string;

  constructor(status: number, code: string, message: string) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const wireErrorSchema = z.object({ error: z.object({ message: z.string(), code: z.string() }) });

/** @throws ApiError what the edge answered, or `network` when there was no answer. */
export async function failure(response: Response): Promise<ApiError> {
  const text = await response.text();
  try {
    const { error } = wireErrorSchema.parse(JSON.parse(text));
    return new ApiError(response.status, error.code, error.message);
  } catch {
    return new ApiError(response.status, 'unreadable', `The edge answered ${response.status}.`);
  }
}

type Call = {
  readonly method?: string;
  /** Sent as JSON. */
  readonly body?: unknown;
  /** A file that is sent as the body, unchanged: JSON lines. */
  readonly file?: Blob;
  readonly signal?: AbortSignal;
  /** The page is left whatever the answer is: no session is waited for. */
  readonly isLast?: boolean;
};

let session: Session | undefined;
/** The OpenID Connect provider for signing in, if any; a header of the session endpoint names it. */
let provider: string | undefined;
let onSessionEnd: (why: string) => 'kept' | 'left' = () => 'left';
/** While the page is kept without a session: settles when somebody has logged in, or the page is left. */
let loggedIn: PromiseWithResolvers<void> | undefined;
let onChange: () => void = () => undefined;

/** How far the edge's clock is ahead of the browser's, which may be wrong. */
let ahead_ms = 0;
/** Smaller differences do not count: a `Date` header has whole seconds, and an answer takes its time. */
const CLOCKS_APART_ms = 3_000;

/** The time by the edge's clock. */
export const edgeNow_ms = (): number => Date.now() + ahead_ms;

function noteTime(response: Response): void {
  const apart_ms = Date.parse(response.headers.get('date') ?? '') - Date.now();
  if (!Number.isNaN(apart_ms)) ahead_ms = Math.abs(apart_ms) > CLOCKS_APART_ms ? apart_ms : 0;
}

/** `listener` is called after every change that this page makes at the edge. */
export const afterChange = (listener: () => void): void => {
  onChange = listener;
};

/** @throws ApiError `network` when there is no answer; the signal's reason when it aborts. */
export async function reachEdge(path: string, init: RequestInit): Promise<Response> {
  try {
    return await fetch(path, init);
  } catch (error) {
    if (init.signal?.aborted === true) throw error;
    throw new ApiError(0, 'network', 'The edge cannot be reached.');
  }
}

/**
 * A request that was refused for want of a session has changed nothing, so it is sent again when the same person has logged in.
 * @throws ApiError
 */
async function send(path: string, call: Call): Promise<Response> {
  const asked = session;
  const response = await sendOnce(path, call);
  if (response.ok) return response;
  const isOver = call.isLast === true && response.status === 401;
  if (asked !== undefined && !isOver && (await goesOn(asked, response.status))) {
    const second = await sendOnce(path, call);
    if (second.ok) return second;
    throw await failure(second);
  }
  throw await failure(response);
}

async function sendOnce(path: string, { method = 'GET', body, file, signal }: Call): Promise<Response> {
  const response = await reachEdge(path, {
    method,
    headers: {
      ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      ...(file === undefined ? {} : { 'content-type': 'application/x-ndjson' }),
      ...(method === 'GET' || session === undefined ? {} : { [CSRF_HEADER]: session.csrf }),
    },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    ...(file === undefined ? {} : { body: file }),
    ...(signal === undefined ? {} : { signal }),
  });
  provider = response.headers.get(SIGN_IN_HEADER) ?? provider;
  noteTime(response);
  return response;
}

/** Whether the person of an earlier session has another one, after an answer with this status. */
async function goesOn(asked: Session, status: number): Promise<boolean> {
  if (status === 403) return await hasLoggedInAgain(asked);
  if (status !== 401) return false;
  // After the end of the session, or revocation of its key, the login is shown.
  if (session === asked) endSession('The session has ended. Log in again.');
  await loggedIn?.promise;
  return session !== undefined && session !== asked && isSamePerson(session, asked);
}

/** Who somebody is to this page. A new key after a rotation is still the same person; another tenant or role is not. */
export const personOf = ({ person, tenant, role }: Session): string => JSON.stringify([person, tenant, role]);

const isSamePerson = (one: Session, other: Session): boolean => personOf(one) === personOf(other);

function endSession(why: string): void {
  if (session === undefined) return;
  session = undefined;
  if (onSessionEnd(why) === 'kept') loggedIn = Promise.withResolvers();
}

function beginSession(begun: Session | undefined): void {
  session = begun;
  if (begun !== undefined) stopWaiting();
}

/** Lets requests go that wait for a session; without one they fail. */
export function stopWaiting(): void {
  loggedIn?.resolve();
  loggedIn = undefined;
}

/**
 * Tabs of one browser share the cookie. If the same person has logged in again in another tab, this tab continues with
 * the new session; if somebody else has, this tab shows nothing more.
 */
async function hasLoggedInAgain(before: Session): Promise<boolean> {
  const now = await resume().catch(() => before);
  if (now === undefined || now.csrf === before.csrf) return false;
  const isSame = isSamePerson(now, before);
  if (!isSame) endSession('Somebody else has logged in in this browser. Log in again.');
  return isSame;
}

/** A request to the admin API; `path`: below `/admin/v1`. @throws ApiError */
export async function admin<T extends z.ZodType>(
  schema: T,
  path: string,
  call: Call = {},
): Promise<z.output<T>> {
  await loggedIn?.promise;
  const read = check(schema, await (await send(`/admin/v1${path}`, call)).json(), 'the answer');
  if (call.method !== undefined) onChange();
  if (read.kind === 'good') return read.value;
  throw new ApiError(
    200,
    'unreadable',
    `The answer to ${path} is not in the expected form: ${read.message}.`,
  );
}

/** Turns a 404 into null: `.catch(noneIfNotFound)`. */
export function noneIfNotFound(error: unknown): null {
  if (error instanceof ApiError && error.status === 404) return null;
  throw error;
}

/** `listener` is called with the reason when the session ends. If it keeps the page, requests wait for the next session. */
export const sessionEnds = (listener: typeof onSessionEnd): void => {
  onSessionEnd = listener;
};

export const signInProvider = (): string | undefined => provider;

/** The session of the cookie; undefined if nobody is logged in. @throws ApiError */
export async function resume(): Promise<Session | undefined> {
  try {
    const response = await send('/dashboard/session', {});
    beginSession(response.status === 204 ? undefined : sessionSchema.parse(await response.json()));
    return session;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return undefined;
    throw error;
  }
}

/** @throws ApiError `invalid_api_key`, `forbidden` for a key that is not an admin key. */
export async function logIn(key: string): Promise<Session> {
  const response = await send('/dashboard/session', { method: 'POST', body: { key } });
  const begun = sessionSchema.parse(await response.json());
  beginSession(begun);
  return begun;
}

/** With `everywhere` ends all sessions of the key. @throws ApiError */
export async function logOut({ everywhere = false } = {}): Promise<void> {
  const path = `/dashboard/session${everywhere ? '?everywhere=true' : ''}`;
  await send(path, { method: 'DELETE', isLast: !everywhere });
  session = undefined;
}

/** A query string such as `?tenant=…`, without undefined values. */
export function query(values: Record<string, string | number | undefined>): string {
  const entries = Object.entries(values).filter(([, value]) => value !== undefined);
  return entries.length === 0 ? '' : `?${new URLSearchParams(entries.map(([k, v]) => [k, String(v)]))}`;
}
