"use strict";
// What every part of a page uses: text, colours, tokens, the note beside the pointer.
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
