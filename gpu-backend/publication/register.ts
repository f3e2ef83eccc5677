/**
 * Keeps the edge's registry of backends up to date while an autoscaler starts and stops them: each backend has an entry
 * while it is ready. Like the autoscaler, it knows backends only by their number.
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
  /** How this process reaches it. */
  readonly probe: string;
  readonly regions: readonly string[];
};

/**
 * Probes all backends once and updates their entries. An entry with another address belongs to somebody else, for
 * example another region: it is reported as `foreign` and not changed. When no backend is ready, nothing changes: most
 * likely this process has lost its network, and removing all entries would help nobody.
 * @throws MaskrouteError the edge's own, or `edge_unreachable`.
 */
export type Registrar = () => Promise<Looked>;

/** Names of entries. */
type Looked = Readonly<Record<'added' | 'removed' | 'foreign', string[]>>;

const PROBE_TIMEOUT_ms = 2_000;
/** A backend that answers "not ready" loses its entry at once; a silent one after this many probes. */
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
  return async () => {
    const entries = new Map((await listAll(client, '/backends', backendSchema)).map((one) => [one.id, one]));
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
        // A disabled entry is not changed: an administrator disabled it.
        await client.request({ method: 'DELETE', path: `/backends/${id}` }, z.looseObject({}));
        looked.removed.push(id);
      }
    }
    return looked;
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
