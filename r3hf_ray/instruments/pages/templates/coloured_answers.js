// ---- coloured answers: rows of the same tokens, one a method, and under them the score of everything so far ----
const TALL = 60, LOW = 36, STEP = 8;
let laidOut = [];

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

function textNode(answer, k) {
  const text = answer.texts[k], rows = answer.rows.filter((row) => row.of === k), box = element("div", "answer");
  const scores = answer.texts.flatMap((one) => [one.start, ...one.curve]).filter((score) => score !== null);
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
  laidOut.push({ box, text, rows, range: [Math.min(...scores), Math.max(...scores)] });
  if (!text.title) return box;
  const group = element("div", "group-of"), head = element("h4", "", text.title);
  head.append(element("span", "", text.note));
  group.append(head, box);
  return group;
}

function answerNode(answer) {
  const box = element("article", "card"), facts = element("div", "facts");
  const group = element("div", `groups-of${answer.texts.length > 1 ? " two" : ""}`);
  if (answer.label) facts.append(element("b", "", answer.label));
  facts.append(...answer.facts.map(([name, value]) => (name ? fact(name, value.replace("-", "−")) : element("span", "", value))));
  group.append(...answer.texts.map((_, k) => textNode(answer, k)));
  box.append(facts, element("div", "prompt", answer.prompt), group);
  return box;
}

function drawAnswers() {
  const holder = document.getElementById("answers");
  if (!holder) return;
  laidOut = [];
  holder.replaceChildren(...data.answers.map(answerNode));
  laidOut.forEach(layOut);
}
