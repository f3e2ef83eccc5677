/**
 * The edge's registry, kept in step with backends that come and go: each has an entry while it is ready. Who scales
 * them knows their numbers and nothing else, so they are told apart by number.
 */
import { z } from 'zod';
import { backendSchema } from '../../shared/wire/backend-load.ts';
import type { AdminClient } from './admin-client.ts';

/** `{n}` in the texts is the number, from 0. */
export type Fleet = {
  /** How many there may be. */
  readonly count: number;
  /** The entry's name. */
  readonly id: string;
  /** How the edge reaches it. */
  readonly url: string;
  /** How this process does. */
  readonly probe: string;
  readonly regions: readonly string[];
};

export type Registrar = {
  /**
   * Asks all once and changes what has to change; tells what it did, and which names have another address: those are the
   * backends of somebody else, another region say, and stay as they are. When nobody is ready it changes nothing: then it
   * is more likely this process that is cut off, and an edge without entries would be of no more use.
   * @throws MaskrouteError what the edge answers, `edge_unreachable`.
   */
  look(): Promise<Looked>;
};

export type Looked = Readonly<Record<'added' | 'removed' | 'foreign', readonly string[]>>;

const PROBE_TIMEOUT_ms = 2_000;
/** One that says that it is not ready is believed at once, a silent one the second time. */
const SILENCES_MAX = 2;

const listSchema = z.object({ data: z.array(backendSchema) });

export function createRegistrar(client: AdminClient, fleet: Fleet): Registrar {
  const members = Array.from({ length: fleet.count }, (_, n) => {
    const named = (text: string) => text.replaceAll('{n}', String(n));
    return { id: named(fleet.id), url: named(fleet.url), probe: named(fleet.probe) };
  });
  const silences = new Map<string, number>();

  const isGone = (id: string, condition: Condition): boolean => {
    const count = condition === 'silent' ? (silences.get(id) ?? 0) + 1 : 0;
    silences.set(id, count);
    return condition === 'not_ready' || count >= SILENCES_MAX;
  };

  return {
    async look() {
      const { data } = await client.request({ method: 'GET', path: '/backends' }, listSchema);
      const seen = await Promise.all(
        members.map(async (member) => ({ ...member, condition: await conditionOf(member.probe) })),
      );
      const added: string[] = [];
      const removed: string[] = [];
      const foreign: string[] = [];
      const looked = { added, removed, foreign };
      if (seen.every(({ condition }) => condition !== 'ready')) return looked;
      // A disabled entry stays as it is: somebody wanted that.
      const entries = new Map(data.map((entry) => [entry.id, entry]));
      for (const { id, url, condition } of seen) {
        const gone = isGone(id, condition);
        const entry = entries.get(id);
        if (entry !== undefined && !sameAddress(entry.url, url)) foreign.push(id);
        else if (condition === 'ready' && entry === undefined) {
          const body = { id, url, regions: fleet.regions };
          await client.request({ method: 'POST', path: '/backends', body }, backendSchema);
          added.push(id);
        } else if (gone && entry?.enabled === true) {
          await client.request({ method: 'DELETE', path: `/backends/${id}` }, z.looseObject({}));
          removed.push(id);
        }
      }
      return looked;
    },
  };
}

const sameAddress = (a: string, b: string): boolean =>
  a === b || (URL.canParse(b) && new URL(a).href === new URL(b).href);

type Condition = 'ready' | 'not_ready' | 'silent';

async function conditionOf(url: string): Promise<Condition> {
  try {
    const response = await fetch(`${url}/readyz`, { signal: AbortSignal.timeout(PROBE_TIMEOUT_ms) });
    await response.body?.cancel();
    return response.ok ? 'ready' : 'not_ready';
  } catch {
    return 'silent';
  }
}
