// ---- charts: series as lines with bands, as dots with error bars, as bars, or scattered ----
const has = (y) => y !== null && y !== undefined;
const inkOf = (series, i) => colour(series.quiet ? "--c6" : `--c${i % 6}`);
const POINTED = 32; // a line of fewer points shows each

function lineTraces(series, i, chart) {
  if (series.stacked) return [{ type: "bar", x: series.x, y: series.y, name: series.label, marker: { color: colour(`--c${i % 7}`), line: { width: 0 } }, hovertemplate: "%{y:.3~g}" }];
  const overBars = chart.series.some((other) => other.stacked), first = series === chart.series.find((other) => !other.stacked);
  const dotted = series.quiet || (overBars && !first);
  const hex = overBars ? colour(first ? "--ink" : "--quiet") : inkOf(series, i), band = !series.low.length ? [] : [{
    x: [...series.x, ...series.x.slice().reverse()], y: [...series.high, ...series.low.slice().reverse()], fill: "toself",
    fillcolor: faded(hex, 0.15), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false,
  }];
  return [...band, {
    x: series.x, y: series.y, name: series.label, mode: series.x.length < POINTED ? "lines+markers" : "lines",
    line: { color: hex, width: 2, dash: dotted ? "dot" : "solid" }, marker: { size: 6 }, hovertemplate: "%{y:.4~g}",
  }];
}

function dotTraces(series, i, chart) {
  const hex = inkOf(series, i), known = series.low.some(has);
  return [{
    x: series.y, y: series.x, name: series.label, mode: "markers", type: "scatter",
    marker: { color: series.marks.length ? series.marks.map((quiet) => (quiet ? colour("--c6") : hex)) : hex, size: 9, symbol: i ? "diamond-open" : "circle", line: { width: 2 } },
    error_x: known ? { type: "data", symmetric: false, array: series.high.map((h, k) => h - series.y[k]), arrayminus: series.low.map((l, k) => series.y[k] - l), color: colour("--quiet"), thickness: 1.2, width: 4 } : undefined,
    hovertemplate: "%{y}: %{x:.3f}<extra>" + (series.label || chart.title) + "</extra>",
  }];
}

const TRACES = {
  lines: lineTraces,
  dots: dotTraces,
  bars: (series, i) => [{ type: "bar", x: series.x, y: series.y, name: series.label, marker: { color: series.marks.length ? series.marks.map((m) => (m ? colour("--c1") : inkOf(series, i))) : inkOf(series, i) }, hovertemplate: "%{y:.3f}" }],
  scatter: (series, i) => [{ type: "scatter", mode: "markers", x: series.x, y: series.y, name: series.label, marker: { color: faded(inkOf(series, i), 0.55), size: 6 }, hovertemplate: "%{x} tokens, %{y:.2f}" }],
};

function across(chart) {
  // The horizontal axis of dots, with room for their error bars.
  const values = chart.series.flatMap((s) => [...s.y, ...s.low, ...s.high]).concat([chart.reference]).filter(has);
  const low = Math.min(...values), high = Math.max(...values), pad = 0.06 * (high - low) || 0.1;
  return { range: [low - pad, high + pad], showgrid: true };
}

function upwards(chart) {
  const values = chart.series.flatMap((series) => series.y);
  if (chart.y_axis === "fitted") return {};
  if (chart.y_axis === "from zero") return values.every((y) => y === 0) ? { range: [-0.04, 1] } : { rangemode: "tozero" };
  const decades = values.filter((y) => y > 0).map(Math.log10);
  const range = decades.length ? [Math.floor(Math.min(...decades)) - 0.1, Math.ceil(Math.max(...decades)) + 0.1] : [-8, 0];
  return { type: "log", exponentformat: "power", dtick: Math.ceil((range[1] - range[0]) / 6), range };
}

function layout(chart) {
  const axis = { gridcolor: colour("--rule"), linecolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true, nticks: 6 };
  const many = chart.series.length > 1, dots = chart.kind === "dots";
  const title = (text) => ({ text, standoff: 6, font: { size: 11.5 } });
  const upright = (x, line) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line });
  const level = (y, line) => ({ type: "line", y0: y, y1: y, xref: "paper", x0: 0, x1: 1, line });
  const dashed = { color: colour("--quiet"), width: 1.2, dash: "dash" }, dotted = { color: colour("--warn"), width: 1, dash: "dot" };
  return {
    margin: { l: 46, r: 12, t: many ? 30 : 8, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: colour("--quiet") },
    xaxis: { ...axis, title: title(dots ? chart.y_title : chart.x_title), showgrid: false, zeroline: false, tickformat: chart.percent ? ".0%" : undefined, ...(dots ? across(chart) : {}) },
    yaxis: { ...axis, ...(dots ? { autorange: "reversed", nticks: undefined, showgrid: true, type: "category" } : { title: title(chart.y_title), ...upwards(chart) }) },
    hovermode: dots || chart.kind === "scatter" ? "closest" : "x unified", showlegend: many, barmode: "stack", bargap: 0.14,
    shapes: [...chart.events.map((x) => upright(x, dotted)), ...(has(chart.reference) ? [(dots ? upright : level)(chart.reference, dashed)] : [])],
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant", traceorder: "normal" },
  };
}

function drawCharts() {
  data.charts.forEach((chart, i) => Plotly.react(`chart-${i}`, chart.series.flatMap((s, k) => TRACES[chart.kind](s, k, chart)), layout(chart), { responsive: true, displayModeBar: false }));
}
