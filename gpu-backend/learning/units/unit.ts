/**
 * The work of a learning run, in units. A unit depends on nothing but what stands in it and on whose model computes it, so
 * any process on any machine may compute it, and its name says by content what it is. All else in a run is decisions, which
 * are functions of the units' results.
 */
import { z } from 'zod';
import manifest from '../../../package.json' with { type: 'json' };
import type { Mask } from '../../../shared/mask/mask.ts';
import { maskBits } from '../../../shared/mask/mask.ts';
import { modelManifestSchema } from '../../model/model-source.ts';
import type { InstalledModel } from '../../model/store.ts';
import type { Surrogates } from '../../model/surrogates.ts';
import type { Sample } from '../data/samples.ts';
import type { SampleBatch } from '../gates/batches.ts';
import { contentKey, modelKey } from '../journal.ts';
import { SCORES_VERSION } from '../search/score-masks.ts';

/** Raised when the same unit comes to other numbers. */
const UNITS_VERSION = 2;

const count = z.int().min(0);
const counts = z.array(count);

/** A batch under gates: its mean loss, or the loss and its gradient by each gate. */
const batchUnitSchema = z.strictObject({
  kind: z.enum(['loss', 'step']),
  targets: z.enum(['dense', 'next-token']),
  batch: z.strictObject({ tokenIds: counts, sequences: count, scoredRows: counts, nextIds: counts }),
  gates: z.array(z.number()),
});

/** A sample under each of some masks: the figures of its scores (`SCORE_FIGURES`), mask after mask. */
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
  ...{ kind: 'score', tokenIds: Array.from(tokenIds), scoreFrom },
  masks: masks.map(maskBits),
});

/** Whose units they are: the model to the byte, what stands in for its blocks, and the version that computes. */
export const workSchema = z.strictObject({
  /** Of the product, and of what its units and scores come to. */
  version: z.string(),
  model: z.strictObject({
    ...{ name: z.string(), hash: z.string(), weights: z.string(), format: z.string() },
    fourBits: modelManifestSchema.shape.fourBits,
  }),
  surrogates: z.string().nullable(),
});
export type Work = z.infer<typeof workSchema>;

export function workOf({ manifest: model }: InstalledModel, surrogates: Surrogates | undefined): Work {
  const { name, hash, weights, format, fourBits } = model;
  return {
    version: `${manifest.version} (units ${UNITS_VERSION}, scores ${SCORES_VERSION})`,
    model: { name, hash, weights, format, ...(fourBits && { fourBits }) },
    surrogates: surrogates?.id ?? null,
  };
}

/** What a model is called makes no difference. */
export const sameWork = (a: Work, b: Work): boolean => workKey(a) === workKey(b);
const workKey = ({ version, model, surrogates }: Work): string =>
  contentKey({ version, model: modelKey(model), surrogates });

/** The name of a unit: SHA-256 of its content and of whose it is. */
export const unitName = (work: Work, unit: Unit): string => contentKey([workKey(work), unit]);

/** For people. */
export function describeWork({ version, model, surrogates }: Work): string {
  const weights = model.fourBits === undefined ? model.weights : `${model.weights} by ${model.fourBits.text}`;
  return `${model.name} (${weights}, ${model.hash.slice(0, 12)}, ${surrogates ?? 'no surrogates'}), version ${version}`;
}
