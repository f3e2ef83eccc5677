/**
 * Keeps the edge's registry in step with backends that come and go: each has an entry while it is ready. A scaler knows
 * backends by number and nothing else, and so does this.
 */
import { z } from 'zod';
import { backendSchema } from '../../shared/wire/backend-load.ts';
import { type AdminClient, listAll } from './admin-client.ts';

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
   * Asks all once, and changes what has to change. An entry with another address belongs to somebody else, another
   * region say: it is reported as `foreign` and stays as it is. When no backend is ready nothing changes: then it is more
   * likely that this process is cut off, and an edge without entries would be of no more use.
   * @throws MaskrouteError what the edge answers, `edge_unreachable`.
   */
  look(): Promise<Looked>;
};

/** Names of entries. */
type Looked = Readonly<Record<'added' | 'removed' | 'foreign', string[]>>;

const PROBE_TIMEOUT_ms = 2_000;
/** A backend that says that it is not ready is believed at once, a silent one the second time. */
const SILENCES_MAX = 2;

type Condition = 'ready' | 'not_ready' | 'silent';

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
      const entries = new Map(
        (await listAll(client, '/backends', backendSchema)).map((one) => [one.id, one]),
      );
      const conditions = await Promise.all(members.map(({ probe }) => conditionOf(probe)));
      const looked: Looked = { added: [], removed: [], foreign: [] };
      if (conditions.every((condition) => condition !== 'ready')) return looked;
      for (const [index, { id, url }] of members.entries()) {
        const condition = conditions[index]!;
        const gone = isGone(id, condition);
        const entry = entries.get(id);
        if (entry !== undefined && !sameAddress(entry.url, url)) looked.foreign.push(id);
        else if (condition === 'ready' && entry === undefined) {
          const body = { id, url, regions: fleet.regions };
          await client.request({ method: 'POST', path: '/backends', body }, backendSchema);
          looked.added.push(id);
        } else if (gone && entry?.enabled === true) {
          // A disabled entry stays as it is: somebody wanted that.
          await client.request({ method: 'DELETE', path: `/backends/${id}` }, z.looseObject({}));
          looked.removed.push(id);
        }
      }
      return looked;
    },
  };
}

const sameAddress = (a: string, b: string): boolean =>
  a === b || (URL.canParse(b) && new URL(a).href === new URL(b).href);

async function conditionOf(url: string): Promise<Condition> {
  try {
    const response = await fetch(`${url}/readyz`, { signal: AbortSignal.timeout(PROBE_TIMEOUT_ms) });
    await response.body?.cancel();
    return response.ok ? 'ready' : 'not_ready';
  } catch {
    return 'silent';
  }
}
