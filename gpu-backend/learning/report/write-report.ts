/** Writes `report.html` about the learning run, the evaluation, or both, in a folder. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { html } from 'hono/html';
import type { z } from 'zod';
import { maskFromBits } from '../../../shared/mask/mask.ts';
import { writeWhole } from '../../files.ts';
import { average, percent } from '../../measure.ts';
import { type Evaluation, evaluationSchema } from '../evaluation/result.ts';
import { type LearnedMaskReport, type LearnReport, learnReportSchema } from '../search/learn-report.ts';
import { evaluationSections, evaluationVerdict } from './evaluation-sections.ts';
import {
  clusterTable,
  facts,
  figure,
  type Html,
  headroomTable,
  number,
  page,
  plot,
  section,
  table,
} from './page.ts';

export const LEARN_REPORT_FILE = 'report.json';
export const EVALUATION_FILE = 'evaluation.json';
const HTML_FILE = 'report.html';

/** A learning run, an evaluation, or both. */
type ReportParts =
  | { readonly learn: LearnReport; readonly evaluation?: undefined }
  | { readonly learn?: LearnReport | undefined; readonly evaluation: Evaluation };

/** Writes the page of a learning run; an evaluation in the folder is on it if it judged this set, not an earlier one. */
export async function writeLearnPage(folder: string, learn: LearnReport): Promise<void> {
  const found = await readAs(join(folder, EVALUATION_FILE), evaluationSchema);
  const evaluation = found && hasJudged(found, learn) ? found : undefined;
  const parts = evaluation === undefined ? { learn } : { learn, evaluation };
  await writeWhole(join(folder, HTML_FILE), reportHtml(parts));
}

/** Writes the page of an evaluation, with the first learning report in the folder or in `others` that is of a judged set. */
export async function writeEvaluationPage(
  folder: string,
  evaluation: Evaluation,
  others: readonly string[],
): Promise<void> {
  const places = [folder, ...others].map((place) => join(place, LEARN_REPORT_FILE));
  const reports = await Promise.all(places.map((path) => readAs(path, learnReportSchema)));
  const learn = reports.find((report) => report !== undefined && hasJudged(evaluation, report));
  await writeWhole(join(folder, HTML_FILE), reportHtml({ learn, evaluation }));
}

const hasJudged = ({ routing }: Evaluation, { version }: LearnReport): boolean =>
  routing.some(({ maskSet }) => maskSet === version);

export function reportHtml({ learn, evaluation }: ReportParts): string {
  const [title, verdict] =
    evaluation === undefined
      ? [learn.name, learnVerdict(learn)]
      : [learn?.name ?? `Evaluation of ${evaluation.model}`, evaluationVerdict(evaluation)];
  return page(title, verdict, [
    ...(learn === undefined ? [] : learnSections(learn)),
    ...(evaluation === undefined ? [] : evaluationSections(evaluation)),
  ]);
}

/** Whether the masks are worth using, by the run's own held-out figures. */
function learnVerdict(learn: LearnReport): string {
  const held = learn.clusters.flatMap(({ heldOut, share }) => (heldOut === null ? [] : [{ heldOut, share }]));
  const total = held.reduce((sum, { share }) => sum + share, 0);
  const out = `The masks skip ${percent(learn.reachedSparsity)} of the blocks`;
  if (total === 0) return `${out}. Nothing was held out, so how good they are is not known.`;
  const agreement = held.reduce((sum, { heldOut, share }) => sum + (share / total) * heldOut.agreement, 0);
  return `${out} and agree with the dense model on ${percent(agreement)} of held-out tokens. ${routingVerdict(learn)}.`;
}

function routingVerdict({ routing, sharing, masks }: LearnReport): string {
  if (routing.collapse !== null) return 'Routing collapses: nearly all prompts fall into one cluster';
  if (sharing === null) return 'All prompts share one mask, for there is one cluster';
  if (sharing.reason !== null || sharing.headroom === null)
    return `All clusters share one mask: ${sharing.reason ?? 'nothing was held out'}`;
  const { change, changeInterval } = sharing.headroom.routed;
  const spread = changeInterval?.map((value) => percent(-value)).reverse();
  const between = spread === undefined ? '' : ` (${spread.join(' to ')})`;
  return `Routing among ${masks.length} masks takes ${percent(-change)}${between} off the KL of one mask`;
}

/** Undefined for a file that is missing, or by another version. */
async function readAs<T>(path: string, schema: z.ZodType<T>): Promise<T | undefined> {
  try {
    return schema.safeParse(JSON.parse(await readFile(path, 'utf8'))).data;
  } catch {
    return undefined;
  }
}

/* The sections about a learning run: masks, clusters, learning curves, kinds. */

type Sharing = NonNullable<LearnReport['sharing']>;

function learnSections(report: LearnReport): Html[] {
  return [
    section('This mask set', facts(summary(report))),
    section('Masks', maskText(report), heatMap(report)),
    ...(report.sharing === null ? [] : [section('Does routing pay?', ...sharingParts(report.sharing))]),
    section('Clusters', clusterMap(report), clusterFigures(report)),
    section('Learning', learningCurves(report), ...gateTable(report)),
    section('Kinds of prompt', kindsByMask(report)),
  ];
}

function summary(report: LearnReport): [string, string][] {
  const { model, encoder, routing, information_bits, budget } = report;
  return [
    ['version', report.version],
    ['model', `${model.name} (${model.blockCount} blocks)`],
    ['encoder', `${encoder.id}, ${encoder.dimensions} dimensions`],
    ['blocks skipped', `${percent(report.reachedSparsity)}, asked for ${percent(report.targetSparsity)}`],
    ['counted in', budget.cost],
    ['skipped blocks', report.surrogate ? 'replaced by surrogates' : 'skipped'],
    ['masks', `${report.masks.length}, shared by ${report.clusters.length} clusters`],
    ['largest cluster', percent(routing.largestShare)],
    ['cluster tells of the kind', `${number(information_bits.heldOut, 2)} bits (held out)`],
    ['routing', routing.collapse ?? 'in balance'],
  ];
}

const maskText = (report: LearnReport): Html =>
  html`<p>A row for attention and one for FFN of each mask; dark squares are skipped, in the dark theme light ones. ${
    report.surrogate ? 'A surrogate takes the place of each of them.' : ''
  }</p>`;

/** Layers × attention and FFN, two rows a mask. */
function heatMap(report: LearnReport): Html {
  const { model } = report;
  const layers = Array.from({ length: model.blockCount / 2 }, (_, layer) => layer);
  const named = report.masks.map(({ bits }, index) => ({ name: maskName(report, index), bits }));
  const cell = (runs: boolean, what: string) =>
    html`<td class="${runs ? '' : 'out'}" title="${what} ${runs ? 'runs' : 'is skipped'}"><span class="hidden">${runs ? '' : 'skipped'}</span></td>`;
  return html`<div class="scroll"><table class="heat"><caption>Blocks by layer</caption>
<thead><tr><th scope="col">mask</th><th scope="col"><span class="hidden">kind of block</span></th>${layers.map(
    (layer) => html`<th scope="col">${layer}</th>`,
  )}</tr></thead><tbody>${named.map(({ name, bits }) => {
    const { runs } = maskFromBits(model.blockCount, bits);
    const line = (offset: 0 | 1, kind: string) =>
      layers.map((layer) => cell(runs[2 * layer + offset] === 1, `${kind} ${layer}`));
    return html`<tr><th scope="row" rowspan="2">${name}</th><td>A</td>${line(0, 'attention')}</tr>
<tr class="last"><td>F</td>${line(1, 'FFN')}</tr>`;
  })}</tbody></table></div>`;
}

function clusterMap({ clusters }: LearnReport): Html | undefined {
  if (clusters.length < 2) return undefined;
  const points = clusters.map(({ position, share }, i) => ({
    x: position[0],
    y: position[1],
    label: String(i),
    size: 8 + 60 * Math.sqrt(share),
  }));
  const svg = plot([{ name: 'centroids', colour: 0, points }], {
    x: 'first direction',
    y: 'second direction',
    bare: true,
  });
  return figure(
    svg,
    'Centroids along the two main directions of the prompts; the area is the share of prompts.',
  );
}

const clusterFigures = ({ clusters }: LearnReport): Html =>
  table(
    'Clusters and their held-out figures',
    ['cluster', 'prompts', 'share', 'mask', 'A skipped', 'F skipped', 'KL', 'top-1', 'perplexity', 'dense'],
    clusters.map((cluster, i) => [
      `${i}: ${cluster.label}`,
      String(cluster.rows),
      percent(cluster.share),
      String(cluster.maskIndex),
      String(cluster.skipAttention.length),
      String(cluster.skipFfn.length),
      ...(cluster.heldOut === null
        ? ['–', '–', '–', '–']
        : [
            number(cluster.heldOut.kl),
            percent(cluster.heldOut.agreement),
            number(cluster.heldOut.perplexity, 1),
            number(cluster.heldOut.densePerplexity, 1),
          ]),
    ]),
  );

/** Clusters are many; what they share is few. */
const maskName = ({ clusters, masks }: LearnReport, index: number): string => {
  const count = clusters.filter(({ maskIndex }) => maskIndex === index).length;
  const users = `${count} ${count === 1 ? 'cluster' : 'clusters'}, ${percent(masks[index]!.share)} of the prompts`;
  return index === 0 ? `one mask for all: ${users}` : `mask ${index}: ${users}`;
};

const masksOf = (report: LearnReport): (readonly [string, LearnedMaskReport])[] =>
  report.masks.map((mask, index) => [index === 0 ? 'one mask' : `mask ${index}`, mask] as const);

function sharingParts({ headroom, reason, validated_kl, pool, turns, rows }: Sharing): (Html | undefined)[] {
  return [
    html`<p>${
      reason === null
        ? 'Yes: on held-out prompts routing leads one mask by more than its error.'
        : `No: ${reason}. All clusters share the mask for everybody.`
    } Clusters were shared out by the KL of ${rows} prompts that no search saw, in ${turns} turns.</p>`,
    headroom === null ? undefined : headroomTable(headroom),
    validated_kl.length === 0
      ? undefined
      : table(
          'KL by the number of masks, on prompts that did not assign masks to clusters (five-fold cross-validation)',
          validated_kl.map((_, i) => String(i + 1)),
          [validated_kl.map((kl) => number(kl, 4))],
        ),
    table(
      'All candidate masks, by their KL over all of these prompts',
      ['from', 'KL'],
      pool.map(({ source, kl }) => [source, number(kl, 4)]),
    ),
  ];
}

/** Prompts of each kind by mask: a table by cluster could have 256 columns. */
function kindsByMask({ kinds, masks, clusters }: LearnReport): Html {
  const byMask = kinds.fit.map(({ kind, counts }) => ({
    kind,
    counts: masks.map((_, index) =>
      counts.reduce((sum, count, cluster) => sum + (clusters[cluster]!.maskIndex === index ? count : 0), 0),
    ),
  }));
  return clusterTable('Calibration prompts by kind and mask', byMask);
}

function learningCurves(report: LearnReport): Html | undefined {
  const series = masksOf(report)
    .filter(([, { curve }]) => curve.length > 1)
    .map(([name, { curve }], colour) => ({
      name,
      colour,
      joined: true,
      points: smoothed(curve.map(({ loss }) => loss)).map((y, x) => ({ x: x + 1, y })),
    }));
  if (series.length === 0) return undefined;
  const svg = plot(series, { x: 'training step', y: 'loss under drawn gates, nats' });
  return figure(svg, 'Loss while gates learn, a mean over five steps.');
}

/** Mean over a step and its neighbours, two each side. */
const smoothed = (values: readonly number[]): number[] =>
  values.map((_, i) => {
    return average(values.slice(Math.max(0, i - 2), i + 3));
  });

const gateTable = (report: LearnReport): Html[] => [
  table(
    'KL under randomly drawn gates, and under the binary mask made from them',
    ['mask', 'stochastic', 'binary', 'from'],
    masksOf(report).map(([name, { gates, source }]) => [
      name,
      gates === null ? '' : number(gates.stochastic_kl),
      gates === null ? '' : number(gates.binary_kl),
      source,
    ]),
  ),
  table(
    'What the mask for everybody was chosen from',
    ['from', 'KL'],
    report.oneMask.candidates.map(({ source, kl }) => [source, number(kl)]),
  ),
];
