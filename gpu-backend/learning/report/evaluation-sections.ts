/**
 * The report's sections about an evaluation: Pareto chart, quality by sparsity, tables at equal count and equal time,
 * kinds, tasks.
 */
import { html } from 'hono/html';
import { percent } from '../../measure.ts';
import { type Checks, dataLine, type Evaluation, type EvaluationRow, METHODS } from '../evaluation/result.ts';
import {
  clusterTable,
  figure,
  type Html,
  headroomTable,
  number,
  type PointSeries,
  plot,
  section,
  table,
} from './page.ts';

export function evaluationSections(evaluation: Evaluation): Html[] {
  const { rows, equalTime, notes } = evaluation;
  const [first] = rows;
  const intro = html`<p>${evaluation.model}, ${evaluation.weights} weights, on ${first?.rows ?? 0} rows
(${Math.round(first?.positions ?? 0)} positions) that no method was made on. Searches had
${evaluation.search.evaluations} evaluations of about ${evaluation.search.positions} positions each. KL and top-1 agreement are
with the dense model; intervals are 95 %, by resampling rows. Data: ${dataLine(evaluation.data)}.</p>`;
  const sections = [
    section('Quality and speed', intro, pareto(rows), bySparsity(rows)),
    section('At equal count', rowTable('Methods at each sparsity', rows)),
  ];
  if (equalTime.length > 0) {
    const learned = rows.filter(({ method }) => method === 'learned');
    sections.push(
      section(
        'At equal time',
        html`<p>Static methods that skip the fewest blocks that make them as fast as the learned set.</p>`,
        rowTable('Methods at the learned sets’ measured time', [...learned, ...equalTime]),
      ),
    );
  }
  if (evaluation.headroom.length > 0)
    sections.push(section('What routing gains', ...evaluation.headroom.map(headroomOfSet)));
  sections.push(section('By kind of text', kindTable(rows)));
  if (rows.some(({ tasks }) => tasks !== undefined))
    sections.push(section('Multiple choice', taskTable(rows)));
  sections.push(
    ...evaluation.routing.map((one) =>
      section(`Routing: ${one.name}`, clusterTable('Scored rows by kind and cluster', one.kinds)),
    ),
  );
  if (evaluation.checks !== undefined) sections.push(checksSection(evaluation.checks));
  if (notes.length > 0)
    sections.push(section('Notes', html`<ul>${notes.map((note) => html`<li>${note}</li>`)}</ul>`));
  return sections;
}

/** Compares the learned set that saves most time with dense and with the best method that has no clusters. */
export function evaluationVerdict({ rows }: Evaluation): string {
  const dense = rows.find(({ method }) => method === 'dense');
  const [learned] = rows
    .filter(({ method }) => method === 'learned')
    .toSorted((a, b) => a.msPerToken - b.msPerToken);
  if (dense === undefined || learned === undefined) {
    return 'No learned set was compared with the dense model. The tables below show what was.';
  }
  const saved = 1 - learned.msPerToken / dense.msPerToken;
  const speed =
    saved > 0 ? `${percent(saved)} less time per token than dense` : `no less time per token than dense`;
  const first = `The learned masks take ${speed} (${times(learned)} and ${times(dense)}) and agree with it on ${percent(learned.agreement)} of tokens.`;
  const [rival] = rows
    .filter(
      (row) =>
        row.method !== 'dense' && row.method !== 'learned' && row.targetSparsity === learned.targetSparsity,
    )
    .toSorted((a, b) => a.kl - b.kl);
  if (rival === undefined) return `${first} No other method was compared at the same share of blocks.`;
  const better = learned.kl < rival.kl ? 'nearer to dense than' : 'no nearer to dense than';
  return `${first} They are ${better} the best other method with as many blocks skipped, ${nameOf(rival)} (KL ${number(learned.kl)} against ${number(rival.kl)}).`;
}

/** ms/token, with the range over rounds where it is known. */
const times = ({ msPerToken, msPerTokenSpread: spread }: EvaluationRow): string =>
  spread === undefined
    ? `${number(msPerToken, 2)} ms/token`
    : `${number(msPerToken, 2)} ms/token (${number(spread[0], 2)} to ${number(spread[1], 2)})`;
const headroomOfSet = ({ name, surrogate, ...found }: Evaluation['headroom'][number]): Html =>
  html`<h3>${name}${surrogate ? '' : ', holes'}</h3>${headroomTable(found)}`;

const nameOf = ({ method, clusters, surrogate }: EvaluationRow): string => {
  const name = clusters > 1 ? `${method} (${clusters})` : method;
  return method === 'dense' || surrogate ? name : `${name}, holes`;
};

/** One series for each method and flavour. Dense is left out: a KL of 0 has no place on a logarithmic axis. */
function seriesOf(rows: readonly EvaluationRow[], x: (row: EvaluationRow) => number): PointSeries[] {
  const series = new Map<string, PointSeries & { points: { x: number; y: number }[] }>();
  for (const row of rows.toSorted((a, b) => a.targetSparsity - b.targetSparsity)) {
    if (row.method === 'dense' || row.kl <= 0) continue;
    const name = nameOf(row);
    const known = series.get(name) ?? {
      name,
      colour: METHODS.indexOf(row.method) - 1,
      hollow: !row.surrogate,
      joined: true,
      points: [],
    };
    known.points.push({ x: x(row), y: row.kl });
    series.set(name, known);
  }
  return [...series.values()];
}

const pareto = (rows: readonly EvaluationRow[]): Html =>
  figure(
    plot(
      seriesOf(rows, (row) => row.msPerToken),
      { x: 'ms/token', y: 'KL to dense, nats', logarithmicY: true },
    ),
    'KL to dense against ms/token: lower and further left is better. Hollow and dashed: without surrogates.',
  );

function bySparsity(rows: readonly EvaluationRow[]): Html | undefined {
  if (new Set(rows.map(({ targetSparsity }) => targetSparsity)).size < 3) return undefined;
  const svg = plot(
    seriesOf(rows, (row) => 100 * row.sparsity),
    { x: '% of blocks skipped', y: 'KL to dense, nats', logarithmicY: true },
  );
  return figure(svg, 'KL to dense by the share of skipped blocks.');
}

/** Ordered by sparsity, then with and without surrogates, then by KL to dense. */
const inOrder = (rows: readonly EvaluationRow[]): EvaluationRow[] =>
  rows.toSorted(
    (a, b) => a.targetSparsity - b.targetSparsity || Number(a.surrogate) - Number(b.surrogate) || a.kl - b.kl,
  );

const rowTable = (caption: string, rows: readonly EvaluationRow[]): Html =>
  table(
    caption,
    [
      'method',
      'target',
      'A out',
      'F out',
      'weights out',
      'KL',
      '95 %',
      'top-1',
      'perplexity',
      'ms/token',
      'searched',
    ],
    inOrder(rows).map((row) => [
      nameOf(row),
      percent(row.targetSparsity),
      number(row.attention, 1),
      number(row.ffn, 1),
      percent(row.skippedWeightShare),
      number(row.kl),
      row.intervals.kl === null ? '–' : row.intervals.kl.map((value) => number(value)).join(' to '),
      percent(row.agreement),
      number(row.perplexity, 1),
      times(row),
      row.evaluations === null ? '–' : String(row.evaluations),
    ]),
  );

function kindTable(rows: readonly EvaluationRow[]): Html {
  const kinds = Object.keys(rows[0]?.byKind ?? {});
  return table(
    'KL to dense by kind of text',
    ['method', 'target', ...kinds],
    rows
      .filter(({ method }) => method !== 'dense')
      .map((row) => [
        nameOf(row),
        percent(row.targetSparsity),
        ...kinds.map((kind) => number(row.byKind[kind]?.kl ?? Number.NaN)),
      ]),
  );
}

function taskTable(rows: readonly EvaluationRow[]): Html {
  const names = Object.keys(rows.find(({ tasks }) => tasks !== undefined)?.tasks ?? {});
  return table(
    'Accuracy by length-normalised log-likelihood (WinoGrande: plain), and what is kept of dense above chance',
    ['method', 'target', ...names],
    rows.map((row) => [
      nameOf(row),
      percent(row.targetSparsity),
      ...names.map((name) => {
        const task = row.tasks?.[name];
        if (task === undefined) return '–';
        const kept = task.keptAboveChance === null ? '' : ` (${percent(task.keptAboveChance, 0)})`;
        return `${percent(task.accNorm ?? task.acc)}${kept}`;
      }),
    ]),
  );
}

/* The paper's own checks as tables and one picture. */

function checksSection(checks: Checks): Html {
  return section(
    'Checks',
    checks.longText && longText(checks.longText),
    checks.cliff && cliff(checks.cliff),
    checks.narrow && narrow(checks.narrow),
    checks.recall && recall(checks.recall),
    ...(checks.clustersByTask ?? []).map(({ name, kinds }) =>
      clusterTable(`Questions by kind and cluster of ${name}`, kinds),
    ),
  );
}

type Subject = { readonly method: string; readonly targetSparsity: number; readonly surrogate: boolean };

const subjectName = ({ method, targetSparsity, surrogate }: Subject): string =>
  method === 'dense' ? method : `${method}, ${percent(targetSparsity)}${surrogate ? '' : ', holes'}`;

function longText(subjects: NonNullable<Checks['longText']>): Html {
  const windows = subjects[0]?.windows ?? [];
  return table(
    'Generated text, judged by the dense model: perplexity (share of new 4-grams) by generated tokens',
    ['written by', ...windows.map(({ from, to }) => `${from} to ${to}`)],
    subjects.map((subject) => [
      subjectName(subject),
      ...subject.windows.map((one) => `${number(one.perplexity, 1)} (${percent(one.newFourGrams, 0)})`),
    ]),
  );
}

const cliff = (points: NonNullable<Checks['cliff']>): Html =>
  figure(
    plot(
      [
        {
          name: 'FinerCut',
          colour: 5,
          joined: true,
          points: points.filter(({ kl }) => kl > 0).map(({ sparsity, kl }) => ({ x: 100 * sparsity, y: kl })),
        },
      ],
      { x: '% of blocks skipped', y: 'KL to dense, nats', logarithmicY: true },
    ),
    'Where quality falls off: KL along one greedy order.',
  );

function narrow({ kind, sparsity, general, own }: NonNullable<Checks['narrow']>): Html {
  const cells = ({ kl, agreement, perplexity }: (typeof general)['calibratedOnAll']) => [
    number(kl),
    percent(agreement),
    number(perplexity, 1),
  ];
  return table(
    `FinerCut at ${percent(sparsity)}, calibrated on all kinds and on ${kind} alone`,
    ['judged on, calibrated on', 'KL', 'top-1', 'perplexity'],
    [
      ['all, all', ...cells(general.calibratedOnAll)],
      [`all, ${kind}`, ...cells(general.calibratedOnOne)],
      ...(own === null
        ? []
        : [
            [`${kind}, all`, ...cells(own.calibratedOnAll)],
            [`${kind}, ${kind}`, ...cells(own.calibratedOnOne)],
          ]),
    ],
  );
}

const recall = (rows: NonNullable<Checks['recall']>): Html =>
  table(
    `Recall of ${rows[0]?.facts ?? 0} right answers: only their tokens count`,
    ['method', 'KL', 'top-1', 'perplexity'],
    rows.map((row) => [subjectName(row), number(row.kl), percent(row.agreement), number(row.perplexity, 1)]),
  );
