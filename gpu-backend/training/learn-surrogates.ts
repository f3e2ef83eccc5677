/**
 * `maskroute surrogates`: calibration files to a table of surrogates for one model. Closed form first, then
 * distillation; killed and started again with the same inputs, it goes on from the last stored step.
 */
import { createHash } from 'node:crypto';
import { mkdir, readFile, rm } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import { deserialize, serialize } from 'node:v8';
import { MaskrouteError } from '../../shared/errors.ts';
import type { ModelHash } from '../../shared/mask.ts';
import { canonicalJson } from '../../shared/mask-set.ts';
import { readData } from '../calibration/read-data.ts';
import { splitRows } from '../calibration/split.ts';
import { openModelText } from '../model/model-text.ts';
import type { InstalledModel } from '../model/store.ts';
import { sha256OfFiles } from '../model/store.ts';
import type { SurrogateTable } from '../model/surrogates.ts';
import { checkRank, toFileBasis, writeSurrogates } from '../model/surrogates.ts';
import { writeWhole } from '../write-whole.ts';
import { copyTable } from './descend-surrogates.ts';
import type { DistillState } from './distill-surrogates.ts';
import { distill, startDistillation } from './distill-surrogates.ts';
import { rankedMask } from './draw-mask.ts';
import { fitSurrogates } from './fit-surrogates.ts';
import { openLossSession } from './gate-session.ts';
import { openMomentSession } from './moments.ts';
import type { PackedText } from './packed-text.ts';
import { packRows, scoredRowsOf, sequencesOf } from './packed-text.ts';
import { SURROGATE_PARTS } from './surrogate-branch.ts';
import { openSurrogateSession } from './surrogate-session.ts';
import type { TaughtBatch, Teacher } from './teacher.ts';
import { openTeacher } from './teacher.ts';

const SEQUENCE_TOKENS = 128;
const STEP_SEQUENCES = 6;
const HELD_OUT_SHARE = 0.05;
const HELD_OUT_BATCHES = 3;
const FIT_SEQUENCES = 640;
const FIT_CHUNK = 32;
const STORE_EVERY = 10;
/** Raised when the same inputs give another table. */
const METHOD = 'closed-form-and-distillation-1';

export type LearnSurrogatesOptions = {
  readonly model: InstalledModel;
  readonly data: readonly string[];
  /** Rows taken from each file. */
  readonly rowsMax?: number;
  readonly rank: number;
  /** Steps of distillation; 0: the closed form alone. */
  readonly steps: number;
  readonly learningRate?: number;
  readonly seed: number;
  /** The table's file; the state of an unfinished run stands beside it. */
  readonly out: string;
  readonly threads: number;
  readonly onProgress: (stage: SurrogateStage, done: number, total: number, detail?: string) => void;
  readonly signal?: AbortSignal;
};
export type SurrogateStage = 'moments' | 'fit' | 'rank' | 'distil';

export type LearnedSurrogates = {
  /** Held-out KL of the closed form and of what was written, mean over the judged masks. */
  readonly closedForm: number;
  readonly distilled: number;
  readonly steps: number;
};

/** @throws MaskrouteError `invalid_request`, `invalid_data`. Rejects when `signal` aborts; the state stays. */
export async function learnSurrogates(options: LearnSurrogatesOptions): Promise<LearnedSurrogates> {
  checkRank(options.rank);
  const { model, out, threads } = options;
  const { folder, manifest } = model;
  const texts = await prepareTexts(options);
  await mkdir(dirname(resolve(out)), { recursive: true });
  const store = await openRunStore(`${out}.state`, await keyOf(options));
  const run: Run = store.run ?? { table: await fit(options, texts.fit), costs: undefined, state: undefined };
  if (store.run === undefined) await store.write(run);
  const teacher = await openTeacher(folder, manifest.config, manifest.weights, { threads });
  try {
    const heldOut = await taughtBatches(teacher, texts.heldOut);
    const judge = await openJudge(options, heldOut, run.table);
    try {
      const costs = run.costs ?? (await rankBlocks(options, judge, run.table));
      if (run.costs === undefined) await store.write({ ...run, costs });
      const judgeTable = (table: SurrogateTable) => judge.kl(table, judgedMasks(costs));
      const start = run.state ?? (await startDistillation(run.table, judgeTable));
      const state = await descendAll(options, { teacher, texts, costs, judgeTable, store }, start);
      const { best, judgements } = state;
      await writeSurrogates(out, {
        model: manifest.hash as ModelHash,
        table: toFileBasis(best.table, manifest.weights),
        fitted: best.step === 0 ? 'closed form' : `closed form, then ${best.step} steps of distillation`,
      });
      await store.remove();
      return { closedForm: judgements[0]!.kl, distilled: best.kl, steps: state.step };
    } finally {
      await judge.close();
    }
  } finally {
    await teacher.close();
  }
}

type Texts = { readonly fit: PackedText; readonly steps: PackedText; readonly heldOut: PackedText };

async function prepareTexts({ model, data, rowsMax, seed, steps }: LearnSurrogatesOptions): Promise<Texts> {
  const { rows } = await readData(data, rowsMax);
  const { fit, heldOut } = splitRows(rows, HELD_OUT_SHARE);
  const text = await openModelText(model.folder, model.manifest);
  const eosTokenId = model.manifest.eosTokenIds[0]!;
  const pack = (some: typeof rows, sequencesMax: number, purpose: number) =>
    packRows(some, text, eosTokenId, { length: SEQUENCE_TOKENS, sequencesMax, seed: seed + purpose });
  const texts = {
    fit: pack(fit, FIT_SEQUENCES, 0),
    steps: pack(fit, Math.max(1, steps) * STEP_SEQUENCES, 1),
    heldOut: pack(heldOut, HELD_OUT_BATCHES * STEP_SEQUENCES, 2),
  };
  if (texts.heldOut.sequences < STEP_SEQUENCES || texts.steps.sequences < STEP_SEQUENCES) {
    const message = `The data are too few: ${STEP_SEQUENCES} held-out sequences of ${SEQUENCE_TOKENS} tokens are needed.`;
    throw new MaskrouteError('invalid_data', message);
  }
  return texts;
}

async function fit(options: LearnSurrogatesOptions, text: PackedText): Promise<SurrogateTable> {
  const { model, threads, rank, signal, onProgress } = options;
  const { config, weights } = model.manifest;
  const session = await openMomentSession(model.folder, config, weights, { threads });
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
  return fitSurrogates(session.moments, config.hiddenSize, {
    rank,
    onBlock: (done) => onProgress('fit', done, 2 * config.layerCount),
  });
}

async function rankBlocks(
  { onProgress, signal }: LearnSurrogatesOptions,
  judge: Judge,
  table: SurrogateTable,
): Promise<number[]> {
  const costs: number[] = [];
  for (let block = 0; block < table.blockCount; block++) {
    signal?.throwIfAborted();
    const runs = new Uint8Array(table.blockCount).fill(1);
    runs[block] = 0;
    costs.push(await judge.kl(table, [runs], 1));
    onProgress('rank', block + 1, table.blockCount);
  }
  return costs;
}

/** Evenly split at 12.5 and 25 %, attention alone at 25 %: of the blocks that are cheapest alone. */
function judgedMasks(costs: readonly number[]): Uint8Array[] {
  const counts = [0.125, 0.25].map((share) => Math.round(share * costs.length));
  const even = counts.map((count) => rankedMask(costs, Math.floor(count / 2), Math.ceil(count / 2)));
  return [...even, rankedMask(costs, counts[1]!, 0)];
}

type DistillParts = {
  readonly teacher: Teacher;
  readonly texts: Texts;
  readonly costs: readonly number[];
  readonly judgeTable: (table: SurrogateTable) => Promise<number>;
  readonly store: RunStore;
};

async function descendAll(
  options: LearnSurrogatesOptions,
  { teacher, texts, costs, judgeTable, store }: DistillParts,
  start: DistillState,
): Promise<DistillState> {
  const { model, rank, threads, steps, seed, learningRate, onProgress, signal } = options;
  if (steps === 0) return start;
  const { config, weights } = model.manifest;
  const session = await openSurrogateSession(model.folder, config, weights, { rank, threads });
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
        ...(learningRate === undefined ? {} : { learningRate }),
        signal,
        onStep: async (state) => {
          onProgress('distil', state.step, steps, describeStep(state));
          if (state.step % STORE_EVERY === 0)
            await store.write({ table: state.descent.average, costs, state });
        },
      },
      start,
    );
  } finally {
    await session.close();
  }
}

function describeStep({ losses, best, judgements }: DistillState): string {
  const recent = losses.slice(-20);
  const mean = recent.reduce((sum, loss) => sum + loss, 0) / recent.length;
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

type Judge = {
  /** Mean KL over masks and the first `batchCount` held-out batches. */
  kl(table: SurrogateTable, masks: readonly Uint8Array[], batchCount?: number): Promise<number>;
  close(): Promise<void>;
};

async function openJudge(
  { model, threads }: LearnSurrogatesOptions,
  heldOut: readonly TaughtBatch[],
  first: SurrogateTable,
): Promise<Judge> {
  const { folder, manifest } = model;
  // The session reads the table that it was opened with: judged tables are copied into that one.
  const surrogates = copyTable(first);
  const session = await openLossSession(folder, manifest.config, manifest.weights, {
    threads,
    surrogates,
    tail: true,
  });
  return {
    async kl(table, masks, batchCount = heldOut.length) {
      for (const part of SURROGATE_PARTS) surrogates[part].set(table[part]);
      let [sum, count] = [0, 0];
      for (const batch of heldOut.slice(0, batchCount)) {
        for (const runs of masks) {
          sum += (await session.loss(batch, runs)) - batch.entropy;
          count++;
        }
      }
      return sum / count;
    },
    close: () => session.close(),
  };
}

/** What a run has so far; `state` once distillation has begun. */
type Run = {
  readonly table: SurrogateTable;
  readonly costs: readonly number[] | undefined;
  readonly state: DistillState | undefined;
};
type RunStore = {
  readonly run: Run | undefined;
  write(run: Run): Promise<void>;
  remove(): Promise<void>;
};

/** A file that does not read, or that other inputs left, is no run: it is begun anew. */
async function openRunStore(path: string, key: string): Promise<RunStore> {
  const found = await readFile(path)
    .then((bytes) => deserialize(bytes) as { key: string; run: Run })
    .catch(() => undefined);
  return {
    run: found?.key === key ? found.run : undefined,
    write: (run) => writeWhole(path, serialize({ key, run })),
    remove: () => rm(path, { force: true }),
  };
}

/** Everything that the result depends on, but not how many threads computed it. */
export async function keyOf(options: LearnSurrogatesOptions): Promise<string> {
  const { model, data, rowsMax, rank, steps, seed, learningRate } = options;
  const { hash, weights } = model.manifest;
  const inputs = {
    method: METHOD,
    model: [hash, weights],
    data: await sha256OfFiles(data),
    rowsMax: rowsMax ?? null,
    learningRate: learningRate ?? null,
    rank,
    steps,
    seed,
  };
  return createHash('sha256').update(canonicalJson(inputs)).digest('hex');
}
