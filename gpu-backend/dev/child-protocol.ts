/**
 * What `npm start` and its two children say to each other over the IPC channel. Each child is a process of
 * its own: the backend may crash without the edge, and the edge takes workerd with it when it ends.
 */
import { type ErrorCode, MaskrouteError, toMaskrouteError } from '../../shared/errors.ts';

export type ToChild<Config> =
  | { readonly type: 'start'; readonly config: Config }
  | { readonly type: 'drain' }
  | { readonly type: 'stop' };
export type FromChild =
  | ({ readonly type: 'ready' } & Addresses)
  | { readonly type: 'drained' }
  | { readonly type: 'failed'; readonly code: ErrorCode; readonly message: string };

/** `workerUrl`: the edge's worker itself, past the door in front of it. */
export type Addresses = { readonly url: string; readonly workerUrl?: string | undefined };

export type Service = Addresses & {
  /** Takes no new work and ends what runs; it still answers questions about that. */
  drain?(): Promise<void>;
  close(): Promise<void>;
};

/** How long a child may take to end once its parent is gone. */
const ORPHAN_CLOSE_ms = 2000;

/**
 * The child's whole life: start once told to, close when told to, and when the parent is gone (killed,
 * perhaps) go too. Signals are the parent's business: it decides in which order things stop.
 */
export function serveParent<Config>(start: (config: Config) => Promise<Service>): void {
  let service: Service | undefined;
  const begin = async (config: Config) => {
    try {
      service = await start(config);
      const { url, workerUrl } = service;
      process.send?.({ type: 'ready', url, workerUrl } satisfies FromChild);
    } catch (error) {
      console.error(error);
      process.send?.(failure(error), () => process.exit(1));
    }
  };
  const drain = async () => {
    await service?.drain?.();
    process.send?.({ type: 'drained' } satisfies FromChild);
  };
  const end = async (code: number) => {
    await service?.close();
    process.exit(code);
  };
  process.on('message', (message: ToChild<Config>) => {
    switch (message.type) {
      case 'start':
        void begin(message.config);
        return;
      case 'drain':
        void drain();
        return;
      case 'stop':
        void end(0);
    }
  });
  process.on('disconnect', () => {
    // The child leads a group of its own, so this ends what it has started too.
    setTimeout(() => process.kill(-process.pid, 'SIGKILL'), ORPHAN_CLOSE_ms);
    void end(1);
  });
  process.on('SIGINT', () => undefined);
  process.on('SIGTERM', () => undefined);
}

function failure(error: unknown): FromChild {
  if (error instanceof MaskrouteError) return { type: 'failed', code: error.code, message: error.message };
  const { message } = error instanceof Error ? error : toMaskrouteError(error);
  return { type: 'failed', code: 'start_failed', message };
}
