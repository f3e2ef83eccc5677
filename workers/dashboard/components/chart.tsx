/** A chart in the page's colours. The chart has a label for screen readers; its figures are also in a table. */

import type { BarSeriesOption, LineSeriesOption, ScatterSeriesOption } from 'echarts/charts';
import type { GridComponentOption, LegendComponentOption, TooltipComponentOption } from 'echarts/components';
import type { ComposeOption, ECharts } from 'echarts/core';
import { useEffect, useRef, useState } from 'preact/hooks';
import { onThemeChange } from '../look.ts';

export type ChartOption = ComposeOption<
  | BarSeriesOption
  | LineSeriesOption
  | ScatterSeriesOption
  | GridComponentOption
  | LegendComponentOption
  | TooltipComponentOption
>;

export type Palette = {
  readonly text: string;
  readonly line: string;
  readonly background: string;
  readonly series: readonly string[];
};

/** Okabe and Ito's colours, told apart by colour-blind people too; the eighth adapts to the background. */
const SERIES = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#b0a100'];

function paletteOf(element: Element): Palette {
  const style = getComputedStyle(element);
  const colour = (name: string) => style.getPropertyValue(name).trim();
  const text = colour('--pico-color');
  return {
    text,
    line: colour('--pico-muted-border-color'),
    background: colour('--pico-card-background-color'),
    series: [...SERIES, text],
  };
}

export function Chart(props: {
  readonly label: string;
  readonly option: (palette: Palette) => ChartOption;
  readonly height_px?: number;
}) {
  const element = useRef<HTMLDivElement>(null);
  const [chart, setChart] = useState<ECharts>();
  const [isMissing, setMissing] = useState(false);
  const [theme, setTheme] = useState(0);

  useEffect(() => onThemeChange(() => setTheme((before) => before + 1)), []);
  useEffect(() => {
    let made: ECharts | undefined;
    let gone = false;
    const resize = new ResizeObserver(() => made?.resize());
    import('./echarts.ts').then(
      ({ init }) => {
        if (gone) return;
        made = init(element.current!, null, { renderer: 'canvas' });
        resize.observe(element.current!);
        setChart(made);
      },
      // A browser does not retry a failed import, and a newer release has the file under another name.
      () => setMissing(true),
    );
    return () => {
      gone = true;
      resize.disconnect();
      made?.dispose();
    };
  }, []);
  useEffect(() => {
    if (chart === undefined || chart.isDisposed()) return;
    const palette = paletteOf(element.current!);
    chart.setOption(
      {
        animation: false,
        color: [...palette.series],
        textStyle: { color: palette.text, fontFamily: 'inherit' },
        ...props.option(palette),
      },
      { notMerge: true },
    );
  }, [chart, theme, props.option]);

  if (isMissing)
    return (
      <p class="empty">The chart could not be loaded: reload the page. Its figures are in the tables.</p>
    );
  return (
    <div class="chart" role="img" aria-label={props.label}>
      <div ref={element} style={{ height: `${props.height_px ?? 320}px` }} />
    </div>
  );
}

/** One category for each step of a range; a step without values is a gap. */
export const steps = (palette: Palette, starts_ms: readonly number[], step_ms: number) => ({
  ...axis(palette, ''),
  type: 'category' as const,
  data: starts_ms.map((start_ms) => stepName(start_ms, step_ms)),
});

const hours = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit' });
const days = new Intl.DateTimeFormat(undefined, { month: 'short', day: 'numeric', timeZone: 'UTC' });
const daysWithHours = new Intl.DateTimeFormat(undefined, { month: 'short', day: 'numeric', hour: '2-digit' });

function stepName(start_ms: number, step_ms: number): string {
  const format = step_ms >= 86_400_000 ? days : step_ms >= 3_600_000 ? daysWithHours : hours;
  return format.format(new Date(start_ms));
}

/** Axes in the palette's colours. `name` says what is measured, with its unit. */
export const axis = (palette: Palette, name: string, more: object = {}) => ({
  name,
  nameLocation: 'middle' as const,
  nameGap: 30,
  nameTextStyle: { color: palette.text },
  axisLabel: { color: palette.text },
  axisLine: { lineStyle: { color: palette.line } },
  splitLine: { lineStyle: { color: palette.line } },
  ...more,
});

export const legend = (palette: Palette) => ({
  type: 'scroll' as const,
  top: 0,
  textStyle: { color: palette.text },
  pageTextStyle: { color: palette.text },
});

/**
 * A tooltip that is drawn on the canvas: an HTML tooltip would need inline styles, which the content security policy
 * forbids.
 */
export const tooltip = (palette: Palette) => ({
  renderMode: 'richText' as const,
  backgroundColor: palette.background,
  borderColor: palette.line,
  textStyle: { color: palette.text },
});
