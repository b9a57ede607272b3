"""The frame of a page that needs nothing else: style for both color schemes and any width, charts, buttons."""

from __future__ import annotations

import html

from plotly.offline import get_plotlyjs


def page(*, title: str, above: str, body: str) -> str:
    """A whole HTML document of a title, which is escaped, and HTML above and in its body.

    Its policy forbids the browser to fetch anything. An element of the class ``chart`` holds a Plotly figure as JSON
    in a script element. Buttons with ``data-run`` hide what has the same number in ``data-of``, and the curves of
    charts that have it in ``meta``.
    """
    return _PAGE.format(
        title=html.escape(title), style=_STYLE, plotly=get_plotlyjs(), above=above, body=body, script=_SCRIPT
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<header><h1>{title}</h1></header>
{above}
<main>{body}</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { --paper: #f6f7f9; --card: #fff; --ink: #1b1f24; --faint: #5c6670; --line: #dfe3e8; --mark: #fff3d6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #101418; --card: #191f25; --ink: #e6eaee; --faint: #9aa5b1; --line: #2d363f; --mark: #3d3214; }
}
@media (prefers-color-scheme: dark) { .panels figcaption { filter: brightness(1.5); } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 32px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 12px; }
h3 { font-size: 1rem; margin: 16px 0 8px; overflow-wrap: anywhere; }
p { color: var(--faint); margin: 0 0 12px; max-width: 75ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px;
  margin: 0 0 20px; }
nav { position: sticky; top: 0; z-index: 3; background: var(--paper); border-bottom: 1px solid var(--line);
  display: flex; gap: 8px; overflow-x: auto; padding: 10px max(20px, calc((100vw - 1200px) / 2)); margin: 0 0 20px; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 99px;
  padding: 4px 14px; cursor: pointer; white-space: nowrap; }
button[aria-pressed=false] { opacity: .45; text-decoration: line-through; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 24px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { min-width: 7rem; overflow-wrap: anywhere; }
tbody th { font-weight: 400; color: var(--faint); min-width: 9rem; }
tbody td { min-width: 7rem; overflow-wrap: anywhere; }
tr.differs > * { background: var(--mark); }
tr.differs > th { padding-left: 8px; color: var(--ink); }
small { color: var(--faint); }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; overflow-wrap: anywhere; }
details[open] > summary { margin-bottom: 10px; }
aside { border-left: 4px solid #e07a00; padding: 2px 0 2px 14px; margin: 16px 0 0; }
aside h3 { margin: 0; }
ul { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere; }
figure { margin: 0; min-width: 0; }
.charts { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.chart { height: 250px; }
.charts.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
figcaption { font-weight: 600; font-size: .9rem; }
.panels { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr));
  padding-bottom: 20px; margin-bottom: 20px; border-bottom: 1px solid var(--line); }
.panels:last-child { border: 0; margin: 0; padding: 0; }
.panels figcaption { margin-bottom: 6px; }
img { max-width: 100%; height: auto; display: block; }
.panels img { width: 288px; border-radius: 4px; }
dl { display: grid; grid-template-columns: 4.5rem 1fr; gap: 2px 8px; margin: 8px 0 0;
  font-size: .85rem; line-height: 1.4; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.neighbors { display: flex; gap: 12px; margin-bottom: 14px; }
.neighbors figure { flex: 0 0 112px; }
.neighbors figure.query { padding-right: 12px; margin-right: 4px; flex-basis: 125px;
  border-right: 1px solid var(--line); }
.neighbors img { width: 112px; height: 112px; object-fit: contain; border-radius: 4px; border: 3px solid transparent; }
.neighbors .same img { border-color: #2a9d6f; }
.neighbors figcaption { font-weight: 400; font-size: .8rem; overflow-wrap: anywhere; }
.pixels { image-rendering: pixelated; }
.xtick text, .ytick text, .xtitle, .ytitle { fill: var(--faint) !important; }
.modebar-btn path { fill: var(--faint) !important; }
.modebar-group { background: var(--card) !important; }
@media (max-width: 600px) {
  header, main { padding: 0 10px; }
  section { padding: 14px; border-radius: 8px; }
  .panels { grid-template-columns: 1fr 1fr; gap: 16px 12px; }
  .panels img { width: 100%; }
  dl { display: block; }
  dt, dd { display: inline; }
  dt { margin-right: .5em; }
  .modebar { display: none !important; }
  dd::after { content: "\\A"; white-space: pre; }
}
@media (hover: none) { .modebar { display: none !important; } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("button[data-run]")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run), shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const part of document.querySelectorAll(`[data-of="${run}"]`)) part.hidden = !shown;
    for (const chart of document.querySelectorAll(".js-plotly-plot")) {
      const curves = [...chart.data.keys()].filter((n) => chart.data[n].meta === run);
      if (curves.length) Plotly.restyle(chart, {visible: shown}, curves);
    }
  });
}
// Drawn once its box has a width, which is after the layout of the page or when it is unfolded.
const fitted = new ResizeObserver((boxes) => {
  for (const {target: chart, contentRect: {width, height}} of boxes) {
    if (!width) continue;
    if (chart.data) {
      Plotly.relayout(chart, {width});
    } else {
      const {data, layout} = JSON.parse(chart.querySelector("script").textContent);
      Plotly.newPlot(chart, data, {...layout, width, height}, {
        displaylogo: false,
        modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
      });
    }
  }
});
for (const chart of document.querySelectorAll(".chart")) fitted.observe(chart);
"""
