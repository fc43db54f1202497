// The charts of the pages of audit, credit and compare; what they share with a run's report is in drawing.js.
const inkOf = (series, i) => colour(series.quiet ? "--c6" : `--c${i % 6}`);
const has = (y) => y !== null && y !== undefined;

function lineTraces(series, i) {
  const hex = inkOf(series, i), band = series.low ? [{
    x: [...series.x, ...series.x.slice().reverse()], y: [...series.high, ...series.low.slice().reverse()], fill: "toself",
    fillcolor: faded(hex, 0.15), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false,
  }] : [];
  return [...band, {
    x: series.x, y: series.y, name: series.label, mode: "lines+markers", line: { color: hex, width: 2, dash: series.quiet ? "dot" : "solid" },
    marker: { size: 6 }, hovertemplate: "%{y:.3f}",
  }];
}

function dotTraces(series, i) {
  const hex = inkOf(series, i), known = series.low && series.low.some(has);
  return [{
    x: series.y, y: series.x, name: series.label, mode: "markers", type: "scatter",
    marker: { color: series.marks ? series.marks.map((quiet) => (quiet ? colour("--c6") : hex)) : hex, size: 9, symbol: i ? "diamond-open" : "circle", line: { width: 2 } },
    error_x: known ? { type: "data", symmetric: false, array: series.high.map((h, k) => h - series.y[k]), arrayminus: series.low.map((l, k) => series.y[k] - l), color: colour("--quiet"), thickness: 1.2, width: 4 } : undefined,
    hovertemplate: "%{y}: %{x:.3f}<extra>" + series.label + "</extra>",
  }];
}

const TRACES = {
  lines: lineTraces,
  dots: dotTraces,
  bars: (series, i) => [{ type: "bar", x: series.x, y: series.y, name: series.label, marker: { color: series.marks ? series.marks.map((m) => (m ? colour("--c1") : inkOf(series, i))) : inkOf(series, i) }, hovertemplate: "%{y:.3f}" }],
  scatter: (series, i) => [{ type: "scatter", mode: "markers", x: series.x, y: series.y, name: series.label, marker: { color: faded(inkOf(series, i), 0.55), size: 6 }, hovertemplate: "%{x} tokens, %{y:.2f}" }],
};

function layout(chart) {
  const axis = { gridcolor: colour("--rule"), linecolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true, nticks: 7 };
  const many = chart.series.length > 1, dots = chart.kind === "dots";
  const across = chart.series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).concat([chart.reference]).filter(has);
  const low = Math.min(...across), high = Math.max(...across), pad = 0.06 * (high - low) || 0.1;
  const title = (text) => ({ text, standoff: 6, font: { size: 11.5 } });
  const line = { type: "line", line: { color: colour("--quiet"), width: 1.2, dash: "dash" } };
  const reference = !has(chart.reference) ? [] : dots
    ? [{ ...line, x0: chart.reference, x1: chart.reference, yref: "paper", y0: 0, y1: 1 }]
    : [{ ...line, y0: chart.reference, y1: chart.reference, xref: "paper", x0: 0, x1: 1 }];
  return {
    margin: { l: 46, r: 12, t: many ? 30 : 8, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: colour("--quiet") },
    xaxis: { ...axis, title: title(dots ? chart.y_title : chart.x_title), showgrid: dots, zeroline: false, tickformat: chart.percent ? ".0%" : undefined, ...(dots ? { range: [low - pad, high + pad] } : {}) },
    yaxis: { ...axis, ...(dots ? { autorange: "reversed", nticks: undefined, showgrid: true, type: "category" } : { title: title(chart.y_title)}) },
    hovermode: dots || chart.kind === "scatter" ? "closest" : "x unified", showlegend: many, shapes: reference, bargap: 0.12,
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant", traceorder: "normal" },
  };
}

function drawCharts() {
  data.charts.forEach((chart, i) => Plotly.react(`chart-${i}`, chart.series.flatMap((s, k) => TRACES[chart.kind](s, k)), layout(chart), { responsive: true, displayModeBar: false }));
}

startPage(() => {
  drawCharts();
  drawCards();
});
