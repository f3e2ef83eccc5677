/**
 * Pictures as SVG text, drawn by ECharts without a browser. Text and lines take the page's own colour, so that one
 * picture serves light and dark; series have Okabe and Ito's colours, which colour-blind people tell apart too.
 */
import type { LineSeriesOption, ScatterSeriesOption } from 'echarts/charts';
import { LineChart, ScatterChart } from 'echarts/charts';
import type { GridComponentOption, LegendComponentOption } from 'echarts/components';
import { GridComponent, LegendComponent } from 'echarts/components';
import type { ComposeOption } from 'echarts/core';
import { init, use } from 'echarts/core';
import { SVGRenderer } from 'echarts/renderers';

use([LineChart, ScatterChart, GridComponent, LegendComponent, SVGRenderer]);

type Option = ComposeOption<
  LineSeriesOption | ScatterSeriesOption | GridComponentOption | LegendComponentOption
>;
type Series = LineSeriesOption | ScatterSeriesOption;

export const COLOURS = [
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

export type Point = {
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
  /** Joined by a line, in their order. */
  readonly joined?: boolean;
  readonly points: readonly Point[];
};
export type Axes = {
  readonly x: string;
  readonly y: string;
  readonly logarithmicY?: boolean;
  /** Without numbers, for axes that have no unit. */
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
    // The library's own hollow symbols are filled with white.
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
