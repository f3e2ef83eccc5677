/**
 * A door in front of local workerd that tells it when a client is gone.
 *
 * A client that closes its connection while it waits sends a FIN. workerd can't tell that from a client that
 * is merely done sending, so until it writes the next byte it goes on, and so does the engine behind it.
 * A reset it notices at once. Deployed, Cloudflare's own front does this; here it is a pipe that turns the
 * one into the other, as nginx does. Bytes pass through unread.
 */
import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';

export type Front = {
  readonly port: number;
  /** From now on clients are connected to this port; before, they are turned away. */
  leadTo(port: number): void;
  /** Lets nobody in any more. What is under way goes on; who is not done after `limit_ms` is hung up on. */
  close(limit_ms: number): Promise<void>;
};

/**
 * Listens on the loopback interface at `port` (0 picks a free one). It opens before the worker starts, since the worker
 * is told its address. Rejects with the system's error when the port is taken.
 */
export async function openFront(port: number): Promise<Front> {
  let target: number | undefined;
  /** Of every client that is there, its other end. */
  const workers = new Map<Socket, Socket>();
  const server: Server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    if (target === undefined) {
      client.destroy();
      return;
    }
    const worker = connect({ host: '127.0.0.1', port: target, noDelay: true });
    workers.set(client, worker);
    client.on('close', () => workers.delete(client));
    join(client, worker);
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject).listen(port, '127.0.0.1', resolve);
  });
  return {
    port: (server.address() as { port: number }).port,
    leadTo(found) {
      target = found;
    },
    close: async (limit_ms) => {
      const closed = once(server, 'close');
      server.close();
      // Nothing more comes in, as far as workerd knows: it sends what it has to send, and closes.
      for (const worker of workers.values()) worker.end();
      const late = setTimeout(() => {
        for (const client of workers.keys()) client.destroy();
      }, limit_ms);
      await closed;
      clearTimeout(late);
    },
  };
}

function join(client: Socket, worker: Socket): void {
  const hangUp = () => worker.resetAndDestroy();
  client.on('end', hangUp).on('error', hangUp).on('close', hangUp);
  worker.on('error', () => client.destroy()).on('close', () => client.destroySoon());
  client.pipe(worker, { end: false });
  worker.pipe(client);
}
