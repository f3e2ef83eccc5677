/** The frame of a report: one file, no network, light and dark, readable without pictures. */
import { html, raw } from 'hono/html';

export type Html = ReturnType<typeof html>;

const STYLE = `
:root { color-scheme: light dark; --line: #8885; --out: #d55e00; --runs: #0072b233; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #16181d); color: light-dark(#1b1e24, #e6e8ec); }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
section > p { max-width: 46rem; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, caption { text-align: left; font-size: .9rem; opacity: .85; padding: .25rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { vertical-align: bottom; }
.heat th, .heat td { padding: 0; border: 1px solid light-dark(#fff, #16181d); text-align: center; }
.heat th[scope=row] { padding-right: .6rem; text-align: left; font-weight: normal; }
.heat td { width: 1.2rem; min-width: 1.2rem; height: 1.1rem; background: var(--runs); }
.heat td.out { background: var(--out); }
.heat tr.last td, .heat tr.last th { border-bottom: .35rem solid light-dark(#fff, #16181d); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { opacity: .75; } dd { margin: 0; }
.best { font-weight: 700; }
`;

export const page = (title: string, body: readonly Html[]): string =>
  String(html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="content-security-policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>${title}</title>
<style>${raw(STYLE)}</style>
</head>
<body><main><h1>${title}</h1>${body}</main></body>
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

export const facts = (entries: readonly (readonly [name: string, value: string])[]): Html =>
  html`<dl>${entries.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>`;

export const percent = (value: number, digits = 1): string => `${(100 * value).toFixed(digits)} %`;
export const number = (value: number, digits = 3): string =>
  Math.abs(value) >= 100_000 ? value.toExponential(1) : value.toFixed(digits);
