/**
 * `maskroute surrogates`: makes a table of surrogates for one model from calibration files. Closed form first, then
 * distillation; killed and started again with the same inputs, it resumes from the last saved step.
 */
import { readFile, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { deserialize, serialize } from 'node:v8';
import type { SurrogatesId } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { finishInTurns } from '../../event-loop.ts';
import { makeOutFolderOf, removeOldParts, writeWhole } from '../../files.ts';
import { average } from '../../measure.ts';
import { type InstalledModel, sha256OfFiles } from '../../model/store.ts';
import {
  checkRank,
  checkSurrogatesModel,
  readSurrogates,
  type Surrogates,
  type SurrogateTable,
  toFileBasis,
  toInstalledBasis,
  writeSurrogates,
} from '../../model/surrogates.ts';
import { openModelText } from '../../model/tokenizer/model-text.ts';
import { type DataFiles, readDistinct } from '../data/read-data.ts';
import { HELD_OUT_SHARE, splitRows } from '../data/samples.ts';
import { type PackedText, packRows, scoredRowsOf, sequencesOf } from '../gates/batches.ts';
import { fastestRounding, type Rounding } from '../gates/rounding.ts';
import { openTeacher, type TaughtBatch, type Teacher } from '../gates/teacher.ts';
import { contentKey, modelKey, withOutput } from '../journal.ts';
import { type DistillState, distill, openSurrogateSession, startDistillation } from './distill-surrogates.ts';
import { fitSurrogates } from './fit-surrogates.ts';
import { judgedMasks, openJudge, rankBlocks } from './judge-surrogates.ts';
import { openMomentSession } from './moments.ts';

const SEQUENCE_TOKENS = 128;
const STEP_SEQUENCES = 6;
const HELD_OUT_BATCHES = 3;
const FIT_SEQUENCES = 640;
const FIT_CHUNK = 32;
const STORE_EVERY = 10;
/** Raised when the same inputs give another table, or when the state of an unfinished run has other fields. */
const METHOD = 'closed-form-and-distillation-8';

export type LearnSurrogatesOptions = {
  readonly model: InstalledModel;
  readonly data: DataFiles;
  readonly start: StartOptions;
  readonly distillation: DistillationOptions;
  readonly seed: number;
  /** The table's file; the state of an unfinished run is kept beside it, and a lock. */
  readonly out: string;
  readonly threads: number;
  readonly onProgress: (stage: SurrogateStage, done: number, total: number, detail?: string) => void;
  readonly log: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};

/** The table that distillation begins with. */
type StartOptions = {
  /** Rank of the closed form's surrogates. */
  readonly rank: number;
  /** Sequences of 128 tokens that the closed form is fitted on. */
  readonly fitSequences?: number | undefined;
  /** File of a table to start from instead of the closed form; its rank is used. */
  readonly from?: string | undefined;
};

type DistillationOptions = {
  /** 0: the table of the start is the result. */
  readonly steps: number;
  readonly learningRate?: number | undefined;
  /** Masks in use, `[2L]` each, the most important first: distillation mostly trains on them. */
  readonly around?: readonly Uint8Array[] | undefined;
};

type SurrogateStage = 'moments' | 'fit' | 'rank' | 'distil';

type LearnedSurrogates = {
  /** Held-out KL of the table that distillation began with and of what was written, mean over the judged masks. */
  readonly start: number;
  readonly distilled: number;
  readonly steps: number;
};

/**
 * @throws MaskrouteError `invalid_request`, `invalid_data`, `invalid_argument`, `storage_failed`, and `conflict` while another run
 * writes the table. Rejects when `signal` aborts; the state stays.
 */
export async function learnSurrogates(options: LearnSurrogatesOptions): Promise<LearnedSurrogates> {
  const { out } = options;
  const { rank, from: file } = options.start;
  const { manifest } = options.model;
  checkRank(rank);
  if (file === undefined) checkWidth(rank, manifest.config.hiddenSize);
  const from = file === undefined ? undefined : await readSurrogates(file);
  if (from !== undefined) checkSurrogatesModel(from, manifest);
  const texts = await prepareTexts(options);
  await makeOutFolderOf(out);
  const lockFile = join(dirname(out), `.${basename(out)}.lock`);
  return await withOutput(out, () => learnAlone(options, texts, from), lockFile);
}

async function learnAlone(
  options: LearnSurrogatesOptions,
  texts: Texts,
  from: Surrogates | undefined,
): Promise<LearnedSurrogates> {
  const { model, out, threads } = options;
  const { folder, manifest } = model;
  const store = await openRunStore(`${out}.state`, await keyOf(options, from?.id));
  const run = store.run ?? (await begin(options, from?.table, texts.fit));
  const { rounding } = run;
  if (store.run === undefined) await store.write(run);
  await using opened = new AsyncDisposableStack();
  const teacher = await openTeacher(folder, manifest.config, { threads, rounding });
  opened.defer(() => teacher.close());
  const heldOut = await taughtBatches(teacher, texts.heldOut);
  const judge = await openJudge({ model, threads, rounding }, heldOut, run.table);
  opened.defer(() => judge.close());
  const onRanked = (done: number) => options.onProgress('rank', done, run.table.blockCount);
  const costs = run.costs ?? (await rankBlocks(judge, run.table, onRanked, options.signal));
  if (run.costs === undefined) await store.write({ ...run, costs });
  const judgeTable = (table: SurrogateTable) =>
    judge.kl(table, judgedMasks(costs, options.distillation.around));
  const start = run.state ?? (await startDistillation(run.table, judgeTable));
  const state = await descendAll(options, { rounding, teacher, texts, costs, judgeTable, store }, start);
  const { best, judgements } = state;
  await writeSurrogates(out, {
    model: manifest.hash,
    table: toFileBasis(best.table, manifest),
    fitted: [
      from?.fitted ?? 'closed form',
      ...(best.step === 0 ? [] : [`${best.step} steps of distillation`]),
    ].join(', '),
  });
  await store.remove();
  return { start: judgements[0]!.kl, distilled: best.kl, steps: state.step };
}

/** The rank of a map of the residual stream is at most the stream's width. */
function checkWidth(rank: number, hiddenSize: number): void {
  if (rank <= hiddenSize) return;
  const message = `The rank of this model's surrogates is at most ${hiddenSize}, its hidden size, not ${rank}.`;
  throw new MaskrouteError('invalid_request', message);
}

type Texts = { readonly fit: PackedText; readonly steps: PackedText; readonly heldOut: PackedText };

async function prepareTexts(options: LearnSurrogatesOptions): Promise<Texts> {
  const { model, data, seed } = options;
  const { fitSequences = FIT_SEQUENCES } = options.start;
  const { steps } = options.distillation;
  const rows = await readDistinct(data, options);
  const { fit, heldOut } = await finishInTurns(splitRows(rows, HELD_OUT_SHARE), options.signal);
  const text = await openModelText(model.folder, model.manifest);
  const eosTokenId = model.manifest.eosTokenIds[0]!;
  const pack = (some: typeof rows, sequencesMax: number, purpose: number) =>
    packRows(some, text, eosTokenId, { length: SEQUENCE_TOKENS, sequencesMax, seed: seed + purpose });
  const texts = {
    fit: pack(fit, fitSequences, 0),
    steps: pack(fit, Math.max(1, steps) * STEP_SEQUENCES, 1),
    heldOut: pack(heldOut, HELD_OUT_BATCHES * STEP_SEQUENCES, 2),
  };
  if (texts.heldOut.sequences < STEP_SEQUENCES || texts.steps.sequences < STEP_SEQUENCES) {
    const message = `The data are too few: ${STEP_SEQUENCES} held-out sequences of ${SEQUENCE_TOKENS} tokens are needed.`;
    throw new MaskrouteError('invalid_data', message);
  }
  return texts;
}

/** @param from the table to start from, in its file's basis; without, one is fitted on `text`. */
async function begin(
  options: LearnSurrogatesOptions,
  from: SurrogateTable | undefined,
  text: PackedText,
): Promise<Run> {
  const rounding = await fastestRounding();
  const { manifest } = options.model;
  const table = from === undefined ? await fit(options, rounding, text) : toInstalledBasis(from, manifest);
  return { rounding, table, costs: undefined, state: undefined };
}

async function fit(
  options: LearnSurrogatesOptions,
  rounding: Rounding,
  text: PackedText,
): Promise<SurrogateTable> {
  const { model, start, threads, signal, onProgress } = options;
  const { config } = model.manifest;
  const session = await openMomentSession(model.folder, config, { threads, rounding });
  try {
    for (let at = 0; at < text.sequences; at += FIT_CHUNK) {
      signal?.throwIfAborted();
      onProgress('moments', at, text.sequences);
      const to = Math.min(text.sequences, at + FIT_CHUNK);
      await session.add(sequencesOf(text, at, to), to - at);
    }
  } finally {
    await session.close();
  }
  const fitted = fitSurrogates(session.moments, config.hiddenSize, start.rank, (done) =>
    onProgress('fit', done, 2 * config.layerCount),
  );
  return await finishInTurns(fitted, signal);
}

type DistillParts = {
  readonly rounding: Rounding;
  readonly teacher: Teacher;
  readonly texts: Texts;
  readonly costs: readonly number[];
  readonly judgeTable: (table: SurrogateTable) => Promise<number>;
  readonly store: RunStore;
};

async function descendAll(
  options: LearnSurrogatesOptions,
  { rounding, teacher, texts, costs, judgeTable, store }: DistillParts,
  start: DistillState,
): Promise<DistillState> {
  const { model, threads, seed, onProgress, signal } = options;
  const { steps, learningRate, around } = options.distillation;
  if (steps === 0) return start;
  const { rank } = start.descent.table;
  const { config } = model.manifest;
  const session = await openSurrogateSession(model.folder, config, { rank, threads, rounding });
  const batches = Math.floor(texts.steps.sequences / STEP_SEQUENCES);
  try {
    return await distill(
      {
        session,
        steps,
        seed,
        costs,
        batch: (step) => taughtBatch(teacher, texts.steps, (step % batches) * STEP_SEQUENCES),
        judge: judgeTable,
        learningRate,
        around,
        signal,
        onStep: async (state) => {
          onProgress('distil', state.step, steps, describeStep(state));
          if (state.step % STORE_EVERY === 0)
            await store.write({ rounding, table: state.descent.average, costs, state });
        },
      },
      start,
    );
  } finally {
    await session.close();
  }
}

function describeStep({ losses, best, judgements }: DistillState): string {
  const mean = average(losses.slice(-20));
  const last = judgements.at(-1)!;
  return `KL ${mean.toFixed(3)}; held out ${last.kl.toFixed(4)}, best ${best.kl.toFixed(4)} at step ${best.step}`;
}

function taughtBatch(teacher: Teacher, text: PackedText, from: number): Promise<TaughtBatch> {
  const to = Math.min(text.sequences, from + STEP_SEQUENCES);
  return teacher.teach({
    tokenIds: sequencesOf(text, from, to),
    sequences: to - from,
    scoredRows: scoredRowsOf(to - from, text.length),
  });
}

async function taughtBatches(teacher: Teacher, text: PackedText): Promise<TaughtBatch[]> {
  const batches: TaughtBatch[] = [];
  for (let from = 0; from < text.sequences; from += STEP_SEQUENCES)
    batches.push(await taughtBatch(teacher, text, from));
  return batches;
}

/** Hash of everything that the result depends on; the number of threads does not change it. */
async function keyOf(options: LearnSurrogatesOptions, from: SurrogatesId | undefined): Promise<string> {
  const { model, data, seed } = options;
  const { rank, fitSequences } = options.start;
  const { steps, learningRate, around } = options.distillation;
  const inputs = {
    method: METHOD,
    model: modelKey(model.manifest),
    data: await sha256OfFiles(data.files),
    // File names are the kinds of rows, and kinds alternate.
    names: data.files.map((path) => basename(path)),
    rowsMax: data.rowsMax ?? null,
    learningRate: learningRate ?? null,
    fitSequences: fitSequences ?? null,
    from: from ?? null,
    around: around?.map((runs) => runs.join('')) ?? null,
    rank,
    steps,
    seed,
  };
  return contentKey(inputs);
}

/** Saved state of a run; `state` is set once distillation has begun. */
type Run = {
  /** Fastest on the machine that began the run. */
  readonly rounding: Rounding;
  readonly table: SurrogateTable;
  readonly costs: readonly number[] | undefined;
  readonly state: DistillState | undefined;
};
type RunStore = {
  readonly run: Run | undefined;
  write(run: Run): Promise<void>;
  remove(): Promise<void>;
};

/**
 * Keeps the state of an unfinished run beside its output file, in V8's serialization format, written atomically. An
 * unreadable file, or a file from other inputs, is ignored: the run starts afresh.
 */
async function openRunStore(path: string, key: string): Promise<RunStore> {
  await removeOldParts(path);
  const found = await readFile(path)
    .then((bytes) => deserialize(bytes) as { key: string; run: Run })
    .catch(() => undefined);
  return {
    run: found?.key === key ? found.run : undefined,
    write: (run) => writeWhole(path, serialize({ key, run })),
    remove: () => rm(path, { force: true }),
  };
}
