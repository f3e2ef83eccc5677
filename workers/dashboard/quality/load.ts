/** What there is to draw: the evaluation of each set that has one, and the figures that the sets carry themselves. */
import { listSchema, maskSetSummarySchema } from '../../../shared/admin.ts';
import { evaluatedRowSchema } from '../../../shared/evaluation.ts';
import { maskSetSchema } from '../../../shared/mask-set.ts';
import { admin, query } from '../api.ts';
import { shortVersion } from '../format.ts';
import { publicationInUse } from '../live-set.ts';
import { qualityRows } from './held-out.ts';
import { evaluatedRows, type QualityRow } from './rows.ts';

export type Figures = {
  readonly title: string;
  readonly isEvaluation: boolean;
  readonly rows: readonly QualityRow[];
};

/** Each set is read whole; the newest say enough. */
const SET_COUNT_MAX = 12;

/** The evaluation of what is in use first, then those of newer sets, at last what all sets carry. */
export async function loadFigures(tenant: string, signal: AbortSignal): Promise<Figures[]> {
  const scope = query({ tenant });
  const [inUse, { data }] = await Promise.all([
    publicationInUse(tenant, signal),
    admin(listSchema(maskSetSummarySchema), `/mask-sets${scope}`, { signal }),
  ]);
  const sets = inUse === null ? data : [inUse, ...data];
  const versions = [...new Set(sets.map(({ version }) => version))].slice(0, SET_COUNT_MAX);
  const found = await Promise.all(
    versions.map(async (version) => {
      const path = `/mask-sets/${version}`;
      const [set, { data: evaluation }] = await Promise.all([
        admin(maskSetSchema, `${path}${scope}`, { signal }),
        admin(listSchema(evaluatedRowSchema), `${path}/evaluation${scope}`, { signal }),
      ]);
      return { version, set, evaluation };
    }),
  );
  const names = new Map(found.map(({ version, set }) => [version, set.name]));
  const evaluations = found.map(({ version, set, evaluation }) => ({
    title: `evaluation of ${set.name} ${shortVersion(version)}`,
    isEvaluation: true,
    rows: evaluatedRows(evaluation, names),
  }));
  const heldOut = found.flatMap(({ set }) => qualityRows(set));
  return [
    ...evaluations,
    { title: 'held-out figures of every set', isEvaluation: false, rows: heldOut },
  ].filter(({ rows }) => rows.length > 0);
}
