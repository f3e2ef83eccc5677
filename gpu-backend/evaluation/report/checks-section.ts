/** The paper's own checks as tables and one picture. */
import { html } from 'hono/html';
import type { Checks } from '../result.ts';
import { plot } from './charts.ts';
import type { Html } from './page.ts';
import { figure, number, percent, section, table } from './page.ts';

type Subject = { readonly method: string; readonly targetSparsity: number; readonly surrogate: boolean };

const nameOf = ({ method, targetSparsity, surrogate }: Subject): string =>
  method === 'dense' ? method : `${method}, ${percent(targetSparsity)}${surrogate ? '' : ', holes'}`;

export function checksSection(checks: Checks): Html {
  return section(
    'Checks',
    checks.longText && longText(checks.longText),
    checks.cliff && cliff(checks.cliff),
    checks.narrow && narrow(checks.narrow),
    checks.recall && recall(checks.recall),
    ...(checks.clustersByTask ?? []).map((one) => clusters(one)),
  );
}

function longText(subjects: NonNullable<Checks['longText']>): Html {
  const windows = subjects[0]?.windows ?? [];
  return table(
    'Generated text, judged by the dense model: perplexity (share of new 4-grams) by generated tokens',
    ['written by', ...windows.map(({ from, to }) => `${from} to ${to}`)],
    subjects.map((subject) => [
      nameOf(subject),
      ...subject.windows.map((one) => `${number(one.perplexity, 1)} (${percent(one.newFourGrams, 0)})`),
    ]),
  );
}

const cliff = (points: NonNullable<Checks['cliff']>): Html =>
  figure(
    plot(
      [
        {
          ...{ name: 'FinerCut', colour: 5, joined: true },
          points: points.filter(({ kl }) => kl > 0).map(({ sparsity, kl }) => ({ x: 100 * sparsity, y: kl })),
        },
      ],
      { x: '% of blocks out', y: 'KL to dense, nats', logarithmicY: true },
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
    rows.map((row) => [nameOf(row), number(row.kl), percent(row.agreement), number(row.perplexity, 1)]),
  );

const clusters = ({ name, kinds }: NonNullable<Checks['clustersByTask']>[number]): Html =>
  html`${table(
    `Questions by kind and cluster of ${name}`,
    ['kind', ...(kinds[0]?.counts ?? []).map((_, cluster) => String(cluster))],
    kinds.map(({ kind, counts }) => [kind, ...counts.map(String)]),
  )}`;
