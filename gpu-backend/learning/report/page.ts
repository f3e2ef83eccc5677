/**
 * The frame, tables and charts of a report: one HTML file without network access, for light and dark themes, readable
 * without charts.
 */

import { LineChart, type LineSeriesOption, ScatterChart, type ScatterSeriesOption } from 'echarts/charts';
import {
  GridComponent,
  type GridComponentOption,
  LegendComponent,
  type LegendComponentOption,
} from 'echarts/components';
import { type ComposeOption, init, use } from 'echarts/core';
import { SVGRenderer } from 'echarts/renderers';
import { html, raw } from 'hono/html';
import { type Headroom, headroomNotes, headroomRows } from '../../../shared/mask/held-out.ts';
import { signedPercent } from '../../measure.ts';

export type Html = ReturnType<typeof html>;

/** The dashboard's colours: Pico's for the page, and its own for blocks that run and that are skipped. */
const STYLE = `
:root { color-scheme: light dark; --background: light-dark(#fff, #13171f); --line: light-dark(#e7eaf0, #202632);
  --runs: var(--line); --out: light-dark(#0b3d66, #8ecbff); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--background); color: light-dark(#373c44, #c2c7d0); overflow-wrap: anywhere; }
.verdict { font-size: 1.15rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
section > p { max-width: 46rem; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, caption { text-align: left; font-size: .9rem; opacity: .85; padding: .25rem 0; }
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { vertical-align: bottom; }
.heat th, .heat td { padding: 0; border: 1px solid var(--background); text-align: center; }
.heat th[scope=row] { padding-right: .6rem; text-align: left; font-weight: normal; }
.heat td { width: 1.2rem; min-width: 1.2rem; height: 1.1rem; background: var(--runs); }
.heat td.out { background: var(--out); }
.heat tr.last td, .heat tr.last th { border-bottom: .35rem solid var(--background); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr); gap: .2rem 1rem; } dt { opacity: .75; } dd { margin: 0; }
.best { font-weight: 700; }
`;

/** `verdict`: the summary in two sentences at the top. */
export const page = (title: string, verdict: string, body: readonly Html[]): string =>
  String(html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="content-security-policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>${title}</title>
<style>${raw(STYLE)}</style>
</head>
<body><main><h1>${title}</h1><p class="verdict">${verdict}</p>${body}</main></body>
</html>
`);

export const section = (title: string, ...content: readonly (Html | undefined)[]): Html =>
  html`<section><h2>${title}</h2>${content.filter((part) => part !== undefined)}</section>`;

/** `svg` comes from the chart library, which escapes what it is given. */
export const figure = (svg: string, label: string): Html =>
  html`<figure><div class="scroll" role="img" aria-label="${label}">${raw(svg)}</div><figcaption>${label}</figcaption></figure>`;

/** The first column names its row. */
export function table(caption: string, head: readonly string[], rows: readonly (readonly string[])[]): Html {
  return html`<div class="scroll"><table><caption>${caption}</caption>
<thead><tr>${head.map((cell) => html`<th scope="col">${cell}</th>`)}</tr></thead>
<tbody>${rows.map(
    ([first, ...cells]) =>
      html`<tr><th scope="row">${first}</th>${cells.map((cell) => html`<td>${cell}</td>`)}</tr>`,
  )}</tbody></table></div>`;
}

/** Prompts of each kind by cluster. */
export const clusterTable = (
  caption: string,
  kinds: readonly { readonly kind: string; readonly counts: readonly number[] }[],
): Html =>
  table(
    caption,
    ['kind', ...(kinds[0]?.counts ?? []).map((_, cluster) => String(cluster))],
    kinds.map(({ kind, counts }) => [kind, ...counts.map(String)]),
  );

/** What routing gains over one mask, and what it could gain. */
export function headroomTable(headroom: Headroom): Html {
  const spread = (interval: readonly number[] | null, show: (value: number) => string) =>
    interval === null ? '–' : interval.map(show).join(' to ');
  const { masks, rows, positions } = headroom;
  const about = `Headroom of ${masks} masks on ${rows} prompts, ${positions} positions.`;
  return table(
    [about, ...headroomNotes(headroom)].join(' '),
    ['mask of each prompt', 'KL', '95 %', 'against one mask', '95 %'],
    headroomRows(headroom).map(({ name, kl, interval, change, changeInterval }) => [
      name,
      number(kl, 4),
      spread(interval, (value) => number(value, 4)),
      signedPercent(change),
      spread(changeInterval, signedPercent),
    ]),
  );
}

export const facts = (entries: readonly (readonly [name: string, value: string])[]): Html =>
  html`<dl>${entries.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>`;

export const number = (value: number, digits = 3): string =>
  Math.abs(value) >= 100_000 ? value.toExponential(1) : value.toFixed(digits);

/*
 * Charts as SVG text, drawn by ECharts without a browser. Text and lines take the page's colour, so that one chart
 * suits both themes; series have Okabe and Ito's colours, which colour-blind people can tell apart.
 */

use([LineChart, ScatterChart, GridComponent, LegendComponent, SVGRenderer]);

type Option = ComposeOption<
  LineSeriesOption | ScatterSeriesOption | GridComponentOption | LegendComponentOption
>;
type Series = LineSeriesOption | ScatterSeriesOption;

const COLOURS = [
  '#0072b2',
  '#e69f00',
  '#009e73',
  '#cc79a7',
  '#56b4e9',
  '#d55e00',
  '#b0a100',
  '#888888',
  '#aa4499',
  '#44aa99',
] as const;

type Point = {
  readonly x: number;
  readonly y: number;
  readonly label?: string;
  readonly size?: number;
};
export type PointSeries = {
  readonly name: string;
  /** Index into {@link COLOURS}. */
  readonly colour: number;
  /** Hollow marks stand for skipping without surrogates. */
  readonly hollow?: boolean;
  /** Whether the points are joined by a line, in their order. */
  readonly joined?: boolean;
  readonly points: readonly Point[];
};
type Axes = {
  readonly x: string;
  readonly y: string;
  readonly logarithmicY?: boolean;
  /** Axes without numbers, for values that have no unit. */
  readonly bare?: boolean;
};

const WIDTH_px = 760;
const HEIGHT_px = 420;
const LEGEND_ROW_px = 24;
const LEGEND_ENTRIES_A_ROW = 5;

/** Points and lines over two axes, with a legend. */
export function plot(series: readonly PointSeries[], axes: Axes): string {
  const rows = Math.ceil(series.length / LEGEND_ENTRIES_A_ROW);
  const chart = init(null, null, { renderer: 'svg', ssr: true, width: WIDTH_px, height: HEIGHT_px });
  const option: Option = {
    animation: false,
    textStyle: { color: 'currentColor', fontFamily: 'inherit' },
    grid: { left: 70, right: 24, top: 16 + rows * LEGEND_ROW_px, bottom: 56 },
    legend: {
      top: 0,
      itemGap: 24,
      textStyle: { color: 'currentColor' },
      data: series.map(({ name }) => name),
    },
    xAxis: { type: 'value', scale: true, ...axisStyle(axes.x, 32, axes.bare) },
    yAxis: {
      type: axes.logarithmicY ? 'log' : 'value',
      scale: true,
      ...axisStyle(axes.y, 50, axes.bare),
    },
    series: series.map(toSeries),
  };
  chart.setOption(option);
  const svg = chart.renderToSVGString();
  chart.dispose();
  return svg;
}

function toSeries({ name, colour, hollow, joined, points }: PointSeries): Series {
  const own = COLOURS[colour % COLOURS.length]!;
  const data = points.map(({ x, y, label, size }) => ({
    value: [x, y],
    ...(size === undefined ? {} : { symbolSize: size }),
    ...(label === undefined ? {} : { label: { show: true, formatter: label } }),
  }));
  const common = {
    name,
    data,
    symbolSize: 10,
    // ECharts' own hollow symbols are filled with white.
    symbol: 'circle',
    itemStyle: { color: hollow ? 'transparent' : own, borderColor: own, borderWidth: hollow ? 2 : 0 },
    label: { position: 'right' as const, color: 'currentColor' },
  };
  if (!joined) return { type: 'scatter', ...common };
  return {
    type: 'line',
    ...common,
    showSymbol: points.length < 40,
    lineStyle: { color: own, width: 2, type: hollow ? 'dashed' : 'solid' },
  };
}

const axisStyle = (name: string, nameGap: number, bare = false) => ({
  name,
  nameLocation: 'middle' as const,
  nameGap,
  nameTextStyle: { color: 'currentColor' },
  axisLabel: { color: 'currentColor', show: !bare },
  axisLine: { lineStyle: { color: 'currentColor', opacity: 0.5 } },
  axisTick: { show: !bare },
  splitLine: { lineStyle: { color: 'currentColor', opacity: 0.15 } },
});
