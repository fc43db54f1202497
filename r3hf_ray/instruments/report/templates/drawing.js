"use strict";
// What a run's report and the pages of audit, credit and compare draw alike: text, colours, coloured answers, theme.
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

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function show(number, digits = 3) {
  if (number === null || number === undefined) return "–";
  return (number < 0 ? "−" : "") + Math.abs(number).toFixed(digits);
}

const signed = (number, digits = 2) => (number > 0 ? "+" : "") + show(number, digits);

function fact(label, value, className) {
  const node = element("span", className, `${label} `);
  node.append(element("b", "", value));
  return node;
}

function faded(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

// ---- tokens ----
function background(number, scale) {
  const size = Math.min(1, Math.abs(number) / scale);
  if (size < 1e-3) return "";
  const alpha = 0.05 + 0.67 * size ** 0.8; // a little is not nothing
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

const areWords = (pieces) => !pieces.some((piece) => /\s/.test(piece));
const inQuotes = (piece, id) => `“${visible(piece, id).map(([, part]) => part.trimEnd()).join("")}”`;

function tokenNode(piece, id, at, number, scale) {
  const node = element("span", "tok");
  for (const [className, part] of visible(piece, id)) node.append(className ? element("span", className, part) : part);
  node.style.background = background(number, scale);
  node.dataset.at = at;
  return node;
}

// ---- the note beside the pointer ----
function pointOut(event, title, lines) {
  const tip = document.getElementById("tip"), table = element("table");
  for (const [name, value] of lines) {
    const line = element("tr");
    line.append(element("td", "", name), element("td", "", value));
    table.append(line);
  }
  tip.replaceChildren(element("div", "what", title), table);
  tip.hidden = false;
  const area = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - area.width - 8))}px`;
  tip.style.top = `${event.clientY + 22 + area.height > innerHeight ? event.clientY - area.height - 14 : event.clientY + 22}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

// ---- coloured answers: rows of the same tokens, one a method, and under them the score of everything so far ----
const TALL = 60, LOW = 36, STEP = 8;
let answers = [];

function linesOf(widths, room, gap) {
  // From which token to which: no more lines than needed, all about as long, so that no end token stands alone; one
  // begins at the gap.
  const fill = (limit) => {
    const lines = [];
    let from = 0, filled = 0;
    widths.forEach((width, i) => {
      if (i > from && (filled + width > limit || i === gap)) { lines.push([from, i]); from = i; filled = 0; }
      filled += width;
    });
    return [...lines, [from, widths.length]];
  };
  const needed = fill(room).length;
  let limit = widths.reduce((a, b) => a + b, 0) / needed;
  while (limit < room && fill(limit).length > needed) limit += STEP;
  return fill(Math.min(limit, room));
}

function lineNode(text, row, from, to) {
  const line = element("div", "line");
  line.classList.toggle("words", areWords(text.text));
  line.classList.toggle("tagged", row.tagged);
  for (let i = from; i < to; i += 1) {
    const node = tokenNode(text.text[i], text.id[i], i, row.values && row.values[i], row.scale), mark = text.marks[i];
    if (mark) node.classList.add(mark > 0 ? "plus-mark" : "minus-mark");
    if (row.tagged && text.tags[i]) node.dataset.tag = text.tags[i];
    line.append(node);
  }
  return line;
}

function nameNode(row, isFirst) {
  const box = element("div", "name");
  box.title = row.note;
  box.append(element("b", "", row.title));
  if (row.own) box.append(element("span", "own", "this run"));
  if (isFirst && row.total !== null) box.append(element("span", "total", signed(row.total)));
  return box;
}

const scoreBefore = (text, i) => (i === 0 ? text.start : i === text.gap && text.more ? null : text.curve[i - 1]);

function curveNode(text, widths, [from, to], [low, high], tall) {
  const length = widths.slice(from, to).reduce((a, b) => a + b, 0);
  const height = (score) => tall - 4 - (tall - 8) * (score - low) / (high - low || 1);
  const picture = svg("svg", { class: "curve", width: length, height: tall, "aria-hidden": "true" });
  const before = scoreBefore(text, from), points = before === null ? [] : [[0, before]];
  let x = 0;
  for (let i = from; i < to; i += 1) {
    const mark = text.marks[i] > 0 ? " plus" : text.marks[i] < 0 ? " minus" : "";
    picture.append(svg("rect", { class: `spot${mark}`, x, y: 0, width: widths[i], height: tall, "data-at": i }));
    x += widths[i];
    if (text.curve[i] !== null) points.push([x, text.curve[i]]);
  }
  if (text.start !== null) picture.append(svg("line", { class: "zero", x1: 0, x2: length, y1: height(text.start), y2: height(text.start) }));
  picture.append(svg("polyline", { class: "rise", points: points.map(([at, score]) => `${at.toFixed(1)},${height(score).toFixed(1)}`).join(" ") }));
  return picture;
}

function lineGroup(text, rows, widths, [from, to], range) {
  const box = element("div", "line-group"), name = element("div", "name");
  for (const row of rows) box.append(nameNode(row, from === 0), lineNode(text, row, from, to));
  name.append(element("span", "", "score so far"), element("span", "total", `${show(scoreBefore(text, from), 2)} → ${show(text.curve[to - 1], 2)}`));
  box.append(name, curveNode(text, widths, [from, to], range, rows.length > 1 ? TALL : LOW));
  return box;
}

function layOut({ box, text, rows, range }) {
  const trial = element("div", "line-group trial"), line = lineNode(text, rows[0], 0, text.text.length);
  trial.append(nameNode(rows[0], true), line);
  box.replaceChildren(trial);
  const starts = [...line.children].map((node) => node.getBoundingClientRect().left);
  const end = line.getBoundingClientRect().right;
  const widths = starts.map((left, i) => (i + 1 < starts.length ? starts[i + 1] : end) - left);
  const room = box.getBoundingClientRect().right - line.getBoundingClientRect().left;
  const groups = linesOf(widths, room, text.more ? text.gap : -1).map((part) => {
    const group = lineGroup(text, rows, widths, part, range);
    return part[0] === text.gap && text.more ? [element("p", "mark", `… ${text.more} more tokens …`), group] : [group];
  });
  box.replaceChildren(...groups.flat());
}

function answerNode(card, k) {
  const text = card.texts[k], rows = card.panels.filter((row) => row.of === k), box = element("div", "answer");
  const scores = card.texts.flatMap((one) => [one.start, ...one.curve]).filter((score) => score !== null);
  box.classList.toggle("single", rows.length === 1);
  const unpoint = () => { hideTip(); for (const node of box.querySelectorAll(".on")) node.classList.remove("on"); };
  box.addEventListener("pointerover", (event) => {
    const place = event.target.closest("[data-at]");
    unpoint();
    if (!place) return;
    const i = Number(place.dataset.at), of = i < text.gap ? i + 1 : i + 1 + text.more;
    for (const node of box.querySelectorAll(`[data-at="${i}"]`)) node.classList.add("on");
    const paid = rows.filter((row) => row.values).map((row) => [row.title, signed(row.values[i], 3)]);
    const known = text.words[i] ? [["marked", text.words[i]]] : [];
    pointOut(event, `${inQuotes(text.text[i], text.id[i])}  ${of} of ${text.text.length + text.more}`, [...paid, ["score so far", show(text.curve[i])], ...known]);
  });
  box.addEventListener("pointerleave", unpoint);
  answers.push({ box, text, rows, range: [Math.min(...scores), Math.max(...scores)] });
  if (!text.title) return box;
  const group = element("div", "group-of"), head = element("h4", "", text.title);
  head.append(element("span", "", text.note));
  group.append(head, box);
  return group;
}

function cardNode(card) {
  const box = element("article", "card"), facts = element("div", "facts");
  const group = element("div", `groups-of${card.texts.length > 1 ? " two" : ""}`);
  if (card.label) facts.append(element("b", "", card.label));
  facts.append(...card.facts.map(([name, value]) => (name ? fact(name, value.replace("-", "−")) : element("span", "", value))));
  group.append(...card.texts.map((_, k) => answerNode(card, k)));
  box.append(facts, element("div", "prompt", card.prompt), group);
  return box;
}

function drawCards() {
  const holder = document.getElementById("cards");
  if (!holder) return;
  answers = [];
  holder.replaceChildren(...data.cards.map(cardNode));
  answers.forEach(layOut);
}

// ---- theme, size of the window, paper ----
const THEMES = ["auto", "light", "dark"], PAPER = "680px";
function startPage(draw) {
  const use = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    document.getElementById("theme").textContent = `theme: ${theme}`;
    draw();
  };
  const width = (value) => { const cards = document.getElementById("cards"); if (cards) cards.style.width = value; };
  let theme = THEMES.includes(location.hash.replace("#theme-", "")) ? location.hash.replace("#theme-", "") : "auto", waiting = 0;
  document.getElementById("theme").addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % 3]; use(theme); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => use(theme));
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => answers.forEach(layOut), 120); });
  addEventListener("beforeprint", () => { width(PAPER); use("light"); });
  addEventListener("afterprint", () => { width(""); use(theme); });
  use(theme);
}
