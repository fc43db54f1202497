"use strict";
// Text from models is untrusted: it enters the page through textContent only, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function show(number, digits = 3) {
  if (number === null || number === undefined) return "–";
  return (number < 0 ? "−" : "") + Math.abs(number).toFixed(digits);
}

// ---- charts ----
function faded(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

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

// ---- coloured texts ----
function background(number, scale) {
  if (!number) return "";
  const alpha = 0.72 * Math.min(1, Math.abs(number) / scale) ** 0.8;
  return `rgba(${colour(number > 0 ? "--earned" : "--lost")}, ${alpha.toFixed(3)})`;
}

function visible(text, id) {
  // What a reader must see of a token: line ends, lone spaces, control characters, and tokens that decode to nothing.
  if (text === "") return [["mark", `⟨${id}⟩`]];
  if (/^ +$/.test(text)) return [["mark", "·".repeat(text.length)]];
  return text.split(/(\r\n|[\u0000-\u001f\u007f]|\ufffd)/).filter((part) => part !== "").map((part) => {
    if (part === "\n" || part === "\r\n" || part === "\r") return ["mark", "⏎\n"];
    if (part === "\t") return ["mark", "⇥\t"];
    if (part === "\ufffd") return ["mark", "▯"];
    if (part.charCodeAt(0) < 32) return ["mark", String.fromCharCode(0x2400 + part.charCodeAt(0))];
    return ["", part === "\u007f" ? "␡" : part];
  });
}

function tokenNodes(text, panel) {
  const holder = element("div", "tokens"), words = !text.text.some((piece) => /\s/.test(piece));
  if (words) holder.classList.add("words");
  text.text.forEach((piece, i) => {
    if (panel.tags && text.tags[i]) holder.append(element("span", "tag", text.tags[i]));
    const node = element("span", "tok");
    for (const [className, part] of visible(piece, text.id[i])) node.append(className ? element("span", className, part) : part);
    if (panel.values) node.style.background = background(panel.values[i], panel.scale);
    const mark = text.marks[i];
    if (mark) node.classList.add(mark > 0 ? "plus-mark" : "minus-mark");
    node.dataset.at = i;
    holder.append(node);
    if (words) holder.append("\u200b");
  });
  if (text.more) holder.append(element("span", "mark", ` … ${text.more} more tokens`));
  return holder;
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function scorePath(text, low, high) {
  const scores = [text.start, ...text.curve], n = text.curve.length, height = (s) => 54 - 52 * (s - low) / (high - low || 1);
  const picture = svg("svg", { class: "path", viewBox: `0 0 ${n} 56`, preserveAspectRatio: "none", "aria-hidden": "true" });
  text.marks.forEach((mark, i) => { if (mark) picture.append(svg("rect", { class: mark > 0 ? "band-plus" : "band-minus", x: i, width: 1, y: 0, height: 56 })); });
  picture.append(svg("line", { class: "zero", x1: 0, x2: n, y1: height(text.start), y2: height(text.start) }));
  picture.append(svg("polyline", { class: "line", points: scores.map((s, i) => `${i},${height(s).toFixed(2)}`).join(" ") }));
  picture.append(svg("line", { class: "here", x1: -1, x2: -1, y1: 0, y2: 56 }));
  return picture;
}

function panelNode(panel, text) {
  const box = element("div", "panel"), head = element("h4", "", panel.title);
  head.append(element("span", "", panel.note));
  const tokens = tokenNodes(text, panel);
  box.append(head, tokens);
  return [box, tokens];
}

function group(card, k) {
  const text = card.texts[k], box = element("div", "group-of"), grid = element("div", "panels"), holders = [];
  for (const panel of card.panels.filter((p) => p.of === k)) {
    const [node, tokens] = panelNode(panel, text);
    grid.append(node);
    holders.push(tokens);
  }
  const all = card.texts.flatMap((t) => [t.start, ...t.curve]);
  const path = scorePath(text, Math.min(...all), Math.max(...all)), ends = element("div", "ends");
  ends.append(element("span", "", `${show(text.start, 2)} after the prompt`), element("span", "", `whole answer ${show(text.curve[text.curve.length - 1], 2)}`));
  box.append(grid, element("div", "curve-title", "score of everything up to each token"), path, ends);
  const at = (i, event) => pointAt(card, k, i, holders, path, event);
  for (const tokens of holders) tokens.addEventListener("pointerover", (event) => { const tok = event.target.closest(".tok"); if (tok) at(Number(tok.dataset.at), event); });
  path.addEventListener("pointermove", (event) => {
    const area = path.getBoundingClientRect(), i = Math.floor((event.clientX - area.left) / area.width * text.text.length);
    if (i >= 0 && i < text.text.length) at(i, event);
  });
  for (const part of [...holders, path]) part.addEventListener("pointerleave", () => unpoint(holders, path));
  return box;
}

function pointAt(card, k, i, holders, path, event) {
  unpoint(holders, path);
  for (const tokens of holders) tokens.querySelector(`.tok[data-at="${i}"]`).classList.add("on");
  for (const name of ["x1", "x2"]) path.querySelector(".here").setAttribute(name, i + 0.5);
  const text = card.texts[k], tip = document.getElementById("tip"), table = element("table");
  const row = (name, value) => { const line = element("tr"); line.append(element("td", "", name), element("td", "", value)); table.append(line); };
  for (const panel of card.panels.filter((p) => p.of === k && p.values)) row(panel.title, show(panel.values[i]));
  row("score so far", show(text.curve[i]));
  if (text.words[i]) row("marked", text.words[i]);
  const piece = visible(text.text[i], text.id[i]).map(([, part]) => part.trimEnd()).join("");
  tip.replaceChildren(element("div", "what", `“${piece}”  ${i + 1} of ${text.text.length + text.more}`), table);
  tip.hidden = false;
  const area = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - area.width - 8))}px`;
  tip.style.top = `${event.clientY + 22 + area.height > innerHeight ? event.clientY - area.height - 14 : event.clientY + 22}px`;
}

function unpoint(holders, path) {
  document.getElementById("tip").hidden = true;
  for (const tokens of holders) for (const node of tokens.querySelectorAll(".on")) node.classList.remove("on");
  for (const name of ["x1", "x2"]) path.querySelector(".here").setAttribute(name, -1);
}

function cardNode(card) {
  const box = element("article", "card"), facts = element("div", "facts"), groups = element("div", `groups-of${card.texts.length > 1 ? " two" : ""}`);
  if (card.label) facts.append(element("b", "", card.label));
  for (const [name, value] of card.facts) {
    const node = element("span", "", `${name} `);
    node.append(element("b", "", value));
    facts.append(node);
  }
  groups.append(...card.texts.map((_, k) => group(card, k)));
  box.append(facts, element("div", "prompt", card.prompt), groups);
  return box;
}

function drawCards() {
  const holder = document.getElementById("cards");
  if (holder) holder.replaceChildren(...data.cards.map(cardNode));
}

// ---- theme ----
const THEMES = ["auto", "light", "dark"];
function useTheme(theme) {
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  document.getElementById("theme").textContent = `theme: ${theme}`;
  drawCharts();
  drawCards();
}
let theme = THEMES.includes(location.hash.replace("#theme-", "")) ? location.hash.replace("#theme-", "") : "auto";
document.getElementById("theme").addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % 3]; useTheme(theme); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => useTheme(theme));
addEventListener("beforeprint", () => { if (getComputedStyle(root).getPropertyValue("--paper").trim() !== "#f7f7f4") useTheme("light"); });
addEventListener("afterprint", () => useTheme(theme));
useTheme(theme);
