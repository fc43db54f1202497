// ---- sampled responses of some steps, side by side, coloured by any number of a token ----
const FIELDS = { reward: "reward", value: "value", advantage: "advantage", kl: "KL (nats)", prefix_score: "prefix score", logprob: "logprob" };
const EXPLAIN = {
  reward: "what the token earned, in scaled reward", advantage: "how much better than expected the token turned out",
  value: "what the critic expected before the token", kl: "how much likelier the policy made the token than the reference did, in nats",
  prefix_score: "the reward model's score of everything up to the token",
};
const state = { field: "reward", order: "extremes", steps: data.responses.length > 1 ? [0, data.responses.length - 1] : [0] };

function scaleOf(field) {
  const sizes = data.responses.flatMap((dump) => dump.responses.flatMap((r) => r[field])).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
}

function tokenNodes(response, scale) {
  const holder = element("div", "tokens"), words = areWords(response.text);
  holder.classList.toggle("words", words);
  response.text.forEach((text, i) => {
    const number = response[state.field][i], node = tokenNode(text, response.id[i], i, number, scale);
    if (number < 0 && Math.abs(number) > 0.1 * scale) node.classList.add("minus");
    holder.append(node);
    if (words) holder.append("\u200b");
  });
  if (response.length > response.text.length) holder.append(element("span", "mark", ` … ${response.length - response.text.length} more tokens in the samples file`));
  return holder;
}

function scorePath(response) {
  const scores = response.prefix_score, known = scores.filter((s) => s !== null), n = Math.max(scores.length, 1);
  const low = Math.min(0, ...known), high = Math.max(0, ...known), height = (s) => 42 - 40 * (s - low) / (high - low || 1);
  const picture = svg("svg", { class: "path", viewBox: `0 0 ${n} 44`, preserveAspectRatio: "none", "aria-hidden": "true" });
  picture.append(svg("line", { class: "zero", x1: 0, x2: n, y1: height(0), y2: height(0) }));
  const steps = scores.map((s, i) => (s === null ? "" : `${i},${height(s).toFixed(2)} ${i + 1},${height(s).toFixed(2)}`)).join(" ");
  picture.append(svg("polyline", { class: "line", points: steps }), svg("line", { class: "here", x1: -1, x2: -1, y1: 0, y2: 44 }));
  return picture;
}

function card(response, label, scale) {
  const box = element("article", "response"), facts = element("div", "facts");
  if (label) facts.append(element("b", "", label));
  facts.append(fact("score", show(response.score, 2)));
  if (response.gold !== null) facts.append(fact("gold", show(response.gold, 2)));
  facts.append(fact("rewards sum", show(response.total, 2)), fact("tokens", response.length));
  facts.append(response.finish === "eos" ? element("span", "", "ended by the policy") : element("span", "cut", "cut at the limit"));
  facts.append(element("span", "", `prompt ${response.prompt_id}, sample ${response.sample}`));
  const ends = element("div", "ends"), path = scorePath(response), tokens = tokenNodes(response, scale), last = response.prefix_score.length - 1;
  ends.append(element("span", "", `${show(response.prefix_score[0], 2)} after the first token`), element("span", "", `score after the last ${show(response.prefix_score[last], 2)}`));
  box.append(facts, element("div", "prompt", response.prompt), tokens, path, ends);
  const at = (i) => pointAt(response, i, tokens, path);
  tokens.addEventListener("pointerover", (event) => { const tok = event.target.closest(".tok"); if (tok) at(Number(tok.dataset.at))(event); });
  path.addEventListener("pointermove", (event) => {
    const area = path.getBoundingClientRect(), i = Math.floor((event.clientX - area.left) / area.width * response.text.length);
    if (i >= 0 && i < response.text.length) at(i)(event);
  });
  for (const part of [tokens, path]) part.addEventListener("pointerleave", () => unpoint(tokens, path));
  return box;
}

function pointAt(response, i, tokens, path) {
  return (event) => {
    unpoint(tokens, path);
    tokens.querySelector(`.tok[data-at="${i}"]`).classList.add("on");
    for (const name of ["x1", "x2"]) path.querySelector(".here").setAttribute(name, i + 0.5);
    const lines = Object.entries(FIELDS).map(([field, label]) => [label, show(response[field][i])]);
    pointOut(event, `${inQuotes(response.text[i], response.id[i])}  ${i + 1} of ${response.length}, id ${response.id[i]}`, lines);
  };
}

function unpoint(tokens, path) {
  hideTip();
  for (const node of tokens.querySelectorAll(".on")) node.classList.remove("on");
  for (const name of ["x1", "x2"]) path.querySelector(".here").setAttribute(name, -1);
}

function ordered(responses) {
  const best = responses.slice().sort((a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity));
  const names = (list) => list.map((r) => [r, r === best[0] ? "best" : r === best[best.length - 1] ? "worst" : ""]);
  if (state.order === "best") return names(best);
  if (state.order === "worst") return names(best.slice().reverse());
  const mixed = best.map((_, i) => (i % 2 ? best[best.length - (i + 1) / 2] : best[i / 2]));
  return names(mixed);
}

function dumpColumn(column, scale) {
  const dump = data.responses[state.steps[column]], box = element("div", "dump"), head = element("div", "head");
  const title = element("label", "", "step "), pick = element("select");
  data.responses.forEach((d, i) => pick.append(new Option(String(d.step), String(i), false, i === state.steps[column])));
  pick.addEventListener("change", () => { state.steps[column] = Number(pick.value); drawResponses(); });
  title.append(pick);
  const scores = dump.responses.map((r) => r.score).filter((s) => s !== null);
  const mean = scores.length ? show(scores.reduce((a, b) => a + b, 0) / scores.length, 2) : "–";
  head.append(title, element("span", "mean", `${dump.responses.length} responses, mean score ${mean}`));
  box.append(head, ...ordered(dump.responses).map(([response, label]) => card(response, label, scale)));
  return box;
}

function drawResponses() {
  const holder = document.getElementById("responses-drawn");
  if (!holder) return;
  const scale = scaleOf(state.field);
  document.getElementById("legend-low").textContent = show(-scale, 2);
  document.getElementById("legend-high").textContent = `+${show(scale, 2)}`;
  document.getElementById("legend-text").textContent = `${FIELDS[state.field]}: ${EXPLAIN[state.field]}. One scale for every step shown.`;
  holder.replaceChildren(...state.steps.map((_, column) => dumpColumn(column, scale)));
}

for (const id of ["field", "order"]) {
  const pick = document.getElementById(id);
  if (pick) pick.addEventListener("change", () => { state[id] = pick.value; drawResponses(); });
}
