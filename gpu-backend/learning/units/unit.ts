/**
 * Units: the parts into which a learning run's work is divided. A unit's result depends only on its content and the
 * model, so any process on any machine may compute it, and its name is a hash of both. Everything else in a run is
 * decisions, which are functions of the units' results.
 */
import { z } from 'zod';
import manifest from '../../../package.json' with { type: 'json' };
import type { Mask } from '../../../shared/mask/mask.ts';
import { maskBits } from '../../../shared/mask/mask.ts';
import { calibrationIn, modelManifestSchema } from '../../model/model-source.ts';
import type { InstalledModel } from '../../model/store.ts';
import type { Surrogates } from '../../model/surrogates.ts';
import type { Sample } from '../data/samples.ts';
import type { SampleBatch } from '../gates/batches.ts';
import { ROUNDINGS, type Rounding } from '../gates/rounding.ts';
import { contentKey, modelKey } from '../journal.ts';
import { SCORES_VERSION } from '../search/score-masks.ts';

/** Raised when the same unit gives other results. */
const UNITS_VERSION = 3;

const count = z.int().min(0);
const counts = z.array(count);

/** A batch under gates: its mean loss, or the loss and its gradient by each gate. */
const batchUnitSchema = z.strictObject({
  kind: z.enum(['loss', 'step']),
  targets: z.enum(['dense', 'next-token']),
  batch: z.strictObject({ tokenIds: counts, sequences: count, scoredRows: counts, nextIds: counts }),
  gates: z.array(z.number()),
});

/** A sample under several masks: the figures of its scores (`SCORE_FIGURES`), mask after mask. */
const scoreUnitSchema = z.strictObject({
  kind: z.literal('score'),
  tokenIds: counts,
  scoreFrom: count,
  masks: z.array(z.string().regex(/^[0-9a-f]+$/)).min(1),
});

export const unitSchema = z.discriminatedUnion('kind', [batchUnitSchema, scoreUnitSchema]);
export type Unit = z.infer<typeof unitSchema>;
export type BatchUnit = z.infer<typeof batchUnitSchema>;
export type ScoreUnit = z.infer<typeof scoreUnitSchema>;

export function batchUnit(
  kind: BatchUnit['kind'],
  targets: BatchUnit['targets'],
  batch: SampleBatch,
  gates: ArrayLike<number>,
): BatchUnit {
  const { sequences } = batch;
  const [tokenIds, scoredRows, nextIds] = [batch.tokenIds, batch.scoredRows, batch.nextIds].map((ids) =>
    Array.from(ids),
  ) as [number[], number[], number[]];
  return { kind, targets, batch: { tokenIds, sequences, scoredRows, nextIds }, gates: Array.from(gates) };
}

export const scoreUnit = ({ tokenIds, scoreFrom }: Sample, masks: readonly Mask[]): ScoreUnit => ({
  kind: 'score',
  tokenIds: Array.from(tokenIds),
  scoreFrom,
  masks: masks.map(maskBits),
});

/** What units are computed with: the exact model, its surrogates, the rounding of its copies, and the product's version. */
export const workSchema = z.strictObject({
  /** Version of the product, its units and its scores. */
  version: z.string(),
  model: z.strictObject({
    name: z.string(),
    hash: z.string(),
    weights: z.string(),
    format: z.string(),
    fourBits: modelManifestSchema.shape.fourBits,
    columns: modelManifestSchema.shape.columns,
  }),
  surrogates: z.string().nullable(),
  rounding: z.enum(ROUNDINGS),
});
export type Work = z.infer<typeof workSchema>;

export function workOf(
  { manifest: model }: InstalledModel,
  surrogates: Surrogates | undefined,
  rounding: Rounding,
): Work {
  const { name, hash, weights, format, fourBits, columns } = model;
  return {
    version: `${manifest.version} (units ${UNITS_VERSION}, scores ${SCORES_VERSION})`,
    model: { name, hash, weights, format, ...(fourBits && { fourBits }), ...(columns && { columns }) },
    surrogates: surrogates?.id ?? null,
    // In fp32 nothing is rounded, so all runs share one name.
    rounding: weights === 'f32' ? 'blocks' : rounding,
  };
}

/** Whether two works are the same; the model's name does not matter. */
export const sameWork = (a: Work, b: Work): boolean => workKey(a) === workKey(b);
const workKey = ({ version, model, surrogates, rounding }: Work): string =>
  contentKey({ version, model: modelKey(model), surrogates, rounding });

/** The name of a unit: SHA-256 of its content and its work. */
export const unitName = (work: Work, unit: Unit): string => contentKey([workKey(work), unit]);

/** For messages. The rounding is of training steps. */
export function describeWork({ version, model, surrogates, rounding }: Work): string {
  const calibration = calibrationIn(model);
  const weights = calibration === undefined ? model.weights : `${model.weights} by ${calibration.text}`;
  const rounded = model.weights === 'f32' ? '' : `, rounding in ${rounding}`;
  return `${model.name} (${weights}, ${model.hash.slice(0, 12)}, ${surrogates ?? 'no surrogates'}${rounded}), version ${version}`;
}
