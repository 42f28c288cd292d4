// Markdown to elements. Text becomes text nodes, elements come from a fixed set, links have one of
// three schemes; nothing is parsed as HTML or loaded from elsewhere.
//
// `blocks(text)` splits the top level. `render(parent, text)` reads what was added since the last call from
// the block before the last, and keeps the elements of unchanged blocks, items, rows and lines of code: a
// streaming answer is cheap to draw however long it is, and a selection in it stays.

import { diagram } from "./diagrams.js";
import { copyText, h, iconButton, setIcon } from "./dom.js";
import { formula } from "./math.js";
import * as store from "./store.js";
import { paint } from "./syntax.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const CELLS = /^\s*\|?(?:\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/;
const MATH = /^ {0,3}(\$\$|\\\[)/;
const NOTE = /^ {0,3}\[\^([^\]\s]{1,40})\]:\s*/;
const TASK = /^\[([ xX])\]\s+/;
const TOP_LEVEL = 3; // of headings: the page's is 1, a message's 2
const MAX_DEPTH = 12; // of nested lists and quotes; deeper ones stay text

// The blocks of a text: {kind, lines, start}, with the place where each begins.

export function blocks(text) {
  const lines = text.split("\n");
  const result = [];
  let i = 0;
  let start = 0; // of line i
  const advance = (count) => {
    for (const end = i + count; i < end; i++) start += lines[i].length + 1;
  };
  const take = (kind, count, extra = {}) => {
    result.push({ kind, lines: lines.slice(i, i + count), start, ...extra });
    advance(count);
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      advance(1);
    } else if (MATH.test(line) && mathEnd(lines, i) > i) {
      take("math", mathEnd(lines, i) - i);
    } else if (NOTE.test(line)) {
      let end = i + 1;
      while (end < lines.length && lines[end].trim() && (/^ {2,}/.test(lines[end]) || !startsBlock(lines[end]))) end++;
      take("note", end - i);
    } else if (fence) {
      let end = i + 1;
      const closing = new RegExp(`^ {0,3}${fence[2][0]}{${fence[2].length},}\\s*$`);
      while (end < lines.length && !closing.test(lines[end])) end++;
      const closed = end < lines.length;
      take("code", end - i + (closed ? 1 : 0), { language: fence[3], indent: fence[1].length, closed });
    } else if (HEADING.test(line)) {
      take("heading", 1);
    } else if (RULE.test(line)) {
      take("rule", 1);
    } else if (QUOTE.test(line)) {
      let end = i;
      while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !startsBlock(lines[end]))) end++;
      take("quote", end - i);
    } else if (ITEM.test(line)) {
      take("list", listEnd(lines, i) - i);
    } else if (line.includes("|") && i + 1 < lines.length && CELLS.test(lines[i + 1]) &&
               cells(line).length === cells(lines[i + 1]).length) {
      let end = i + 2;
      while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
      take("table", end - i);
    } else {
      let end = i + 1;
      while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end++;
      take("text", end - i);
    }
  }
  return result;
}

// The line after a formula between $$ or \[ and \]; `from` if it does not end before an empty line.
function mathEnd(lines, from) {
  const closing = MATH.exec(lines[from])[1] === "$$" ? "$$" : "\\]";
  for (let i = from; i < lines.length && lines[i].trim(); i++) {
    const line = lines[i].trim();
    if (line.endsWith(closing) && (i > from || line.length > 3)) return i + 1;
    if (line.slice(i > from ? 0 : 2).includes(closing)) return from; // text goes on behind it
  }
  return from;
}

const startsBlock = (line) =>
  FENCE.test(line) || MATH.test(line) || NOTE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function listEnd(lines, from) {
  const ordered = /\d/.test(ITEM.exec(lines[from])[2]);
  let end = from + 1;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    if (!line.trim()) {
      let next = end + 1;
      while (next < lines.length && !lines[next].trim()) next++;
      const continues = next < lines.length && (/^ {2,}/.test(lines[next]) || sameList(lines[next], ordered));
      if (!continues) break;
      end = next;
    } else if (item ? sameList(line, ordered) : /^ {2,}/.test(line) || !startsBlock(line)) {
      end++;
    } else {
      break;
    }
  }
  return end;
}

function sameList(line, ordered) {
  const item = ITEM.exec(line);
  return item !== null && !RULE.test(line) && (item[1].length > 1 || /\d/.test(item[2]) === ordered);
}

// Shows a text in `parent`. Only what may have changed is read: appended text can change the last two blocks.
export function render(parent, text) {
  if (text.includes("\r")) text = text.replace(/\r\n?/g, "\n");
  let { whole = "", list = [] } = parent.rendered ?? {};
  if (text === whole) return;
  const kept = text.startsWith(whole) ? settled(list) : 0;
  const from = kept ? list[kept].start : 0;
  const latest = blocks(text.slice(from));
  let level = kept ? list[kept - 1].level : TOP_LEVEL - 1;
  for (const block of latest) {
    block.start += from;
    if (block.kind === "heading") level = levelOf(block, level);
    block.level = level;
    block.source = source(block);
  }
  list = [...list.slice(0, kept), ...latest];
  draw(parent, list, kept, parent.rendered?.list ?? []);
  parent.rendered = { whole: text, list };
}

// How many of the first blocks stay as they are when text is appended. A formula that has no end yet may take in
// all up to the next empty line.
function settled(list) {
  let count = Math.max(0, list.length - 2);
  for (let i = count - 1; i >= 0; i--) {
    const { start, lines, kind } = list[i];
    if (start + lines.join("\n").length + 1 < list[i + 1].start) break;
    if (kind === "text" && MATH.test(lines[0])) count = i;
  }
  return count;
}

// Makes the children of `parent` those of the blocks from number `at` on.
function draw(parent, list, at, before) {
  while (at < list.length && at < before.length && list[at].source === before[at].source) at++;
  const last = parent.childNodes[at];
  if (at < list.length && last?.grow?.(list[at])) at++;
  while (parent.childNodes.length > at) parent.lastChild.remove();
  for (const block of list.slice(at)) parent.append(element(block, 0));
}

const source = (block) => block.kind + (block.closed ?? "") + (block.kind === "heading" ? block.level : "") + block.lines.join("\n");

// Of a heading below one of level `last`: at most one more, so that the outline of the page has no gaps. How large it
// is drawn is another matter.
const levelOf = ({ lines }, last) => Math.min(6, last + 1, HEADING.exec(lines[0])[1].length + TOP_LEVEL - 1);

function nested(lines, depth) {
  const text = lines.join("\n");
  if (depth >= MAX_DEPTH) return [h("p", {}, text)];
  return blocks(text).map((b) => element(b, depth + 1));
}

function element(block, depth) {
  const { lines } = block;
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading": {
      const [, marks, title] = HEADING.exec(lines[0]);
      return h(block.level ? `h${block.level}` : "p", { class: `heading-${marks.length}` }, ...inline(title ?? "")); // in a list or a quote: no part of the outline
    }
    case "rule":
      return h("hr");
    case "math": {
      const text = lines.join("\n").trim();
      return formula(text.slice(2, -2).trim(), true);
    }
    case "note": {
      const name = NOTE.exec(lines[0])[1];
      const texts = [lines[0].replace(NOTE, ""), ...lines.slice(1).map((l) => l.replace(/^ {1,4}/, ""))];
      return h("div", { class: "note", "data-note": name, tabindex: "-1" }, h("sup", {}, name), h("div", {}, ...nested(texts, depth)));
    }
    case "quote":
      return h("blockquote", { dir: "auto" }, ...nested(lines.map((l) => l.replace(QUOTE, "")), depth));
    case "list":
      return list(lines, depth);
    case "table":
      return table(lines);
    default:
      return h("p", {}, ...inline(lines.map((l) => l.replace(/^ +/, "")).join("\n")));
  }
}

function codeText({ lines, indent, closed }) {
  const strip = new RegExp(`^ {0,${indent}}`);
  return lines.slice(1, closed ? -1 : undefined).map((l) => l.replace(strip, "")).join("\n");
}

function code(block) {
  const { language } = block;
  const content = h("code");
  let text = codeText(block);
  paint(content, text, language);
  const copy = iconButton("copy", "Copy the code", async () => {
    await copyText(text);
    setIcon(copy, "check", "Copied");
    setTimeout(() => setIcon(copy, "copy", "Copy the code"), 1500);
  });
  const figure = h("figure", { class: "code", dir: "ltr" });
  const wrap = iconButton("wrap", "Wrap lines", () => {
    setWrapped(figure, wrap, !figure.classList.contains("wrapped"));
    store.saveSettings({ ...store.settings(), wrap: figure.classList.contains("wrapped") });
  });
  figure.append(
    h("figcaption", {}, h("span", {}, language || "text"), language.toLowerCase() === "mermaid" && pictureButton(figure, () => text), wrap, copy),
    h("pre", { tabindex: "0" }, content));
  setWrapped(figure, wrap, store.settings().wrap);
  figure.grow = (next) => {
    if (next.kind !== "code" || next.language !== language) return false;
    text = codeText(next);
    paint(content, text, language);
    return true;
  };
  return figure;
}

// Shows a diagram in the place of its text, and the text again.
function pictureButton(figure, text) {
  const button = h("button", { class: "link", type: "button" }, "Show as picture");
  const show = (element) => {
    for (const old of figure.querySelectorAll(".diagram, .hint")) old.remove();
    if (element) figure.append(element);
    const isPicture = element?.tagName === "IFRAME";
    figure.querySelector("pre").hidden = isPicture;
    button.textContent = isPicture ? "Show as text" : "Show as picture";
  };
  button.addEventListener("click", () => {
    if (figure.querySelector("iframe")) show(null);
    else show(diagram(text(), (problem) => show(h("p", { class: "hint" }, `This diagram cannot be drawn: ${problem}`))));
  });
  return button;
}

function setWrapped(figure, button, wrapped) {
  figure.classList.toggle("wrapped", wrapped);
  button.setAttribute("aria-pressed", String(wrapped));
}

// The tag, its first number, whether it has paragraphs, and the lines of each item.
function readList(lines) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length + 1) {
      const width = item[0].length;
      items.push({ width: item[3].length > 4 ? item[0].trimEnd().length + 1 : width, lines: [line.slice(width)] });
    } else {
      const { width } = items.at(-1);
      const spaces = /^ */.exec(line)[0].length;
      items.at(-1).lines.push(line.slice(Math.min(spaces, width)));
    }
  }
  const loose = lines.some((l) => !l.trim());
  const start = ordered ? parseInt(first[2], 10) : 1;
  return { tag: ordered ? "ol" : "ul", start, loose, items: items.map((item) => item.lines) };
}

function listItem(lines, loose, depth) {
  const task = TASK.exec(lines[0]);
  const children = nested(task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines, depth);
  // A tight list has no paragraphs.
  const flat = loose ? children : children.flatMap((e) => (e.tagName === "P" ? [...e.childNodes] : [e]));
  if (!task) return h("li", {}, ...flat);
  const done = task[1] !== " ";
  return h("li", { class: "task" },
    h("input", { type: "checkbox", disabled: true, checked: done, "aria-label": done ? "Done" : "Not done" }), ...flat);
}

function list(lines, depth) {
  let shown = readList(lines);
  const made = h(shown.tag, { dir: "auto", ...(shown.start !== 1 ? { start: shown.start } : {}) },
    shown.items.map((item) => listItem(item, shown.loose, depth)));
  made.grow = (next) => {
    if (next.kind !== "list") return false;
    const now = readList(next.lines);
    if (now.tag !== shown.tag || now.start !== shown.start || now.loose !== shown.loose) return false;
    let same = 0;
    while (same < now.items.length && same < shown.items.length && now.items[same].join("\n") === shown.items[same].join("\n")) same++;
    while (made.childNodes.length > same) made.lastChild.remove();
    made.append(...now.items.slice(same).map((item) => listItem(item, now.loose, depth)));
    shown = now;
    return true;
  };
  return made;
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return trimmed.split(/(?<!\\)\|/).map((c) => c.trim().replace(/\\\|/g, "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : null));
  const row = (line, tag) => {
    const texts = cells(line);
    return h("tr", {}, sides.map((side, column) => h(tag, { class: side }, ...inline(texts[column] ?? ""))));
  };
  const body = h("tbody", {}, lines.slice(2).map((l) => row(l, "td")));
  const made = h("div", { class: "wide", tabindex: "0", dir: "auto" }, h("table", {}, h("thead", {}, row(lines[0], "th")), body));
  let shown = lines;
  made.grow = (next) => {
    if (next.kind !== "table") return false;
    const now = next.lines;
    let same = 0;
    while (same < now.length && same < shown.length && now[same] === shown[same]) same++;
    if (same < 2) return false;
    while (body.childNodes.length > same - 2) body.lastChild.remove();
    body.append(...now.slice(same).map((l) => row(l, "td")));
    shown = now;
    return true;
  };
  return made;
}

// ---- inline

const SAFE = /^(?:https?:\/\/|mailto:)[^\s<>"]+$/i;
const INLINE = [
  // A sticky expression that must match at this position, what it becomes, and what must follow somewhere;
  // `true`: not within a word.
  [/\\\(([^]+?)\\\)/y, (m) => formula(m[1].trim(), false), "\\)"],
  [/\\\[([^]+?)\\\]/y, (m) => formula(m[1].trim(), true), "\\]"],
  [/\$\$([^$]+?)\$\$/y, (m) => formula(m[1].trim(), true), "$$"],
  [/\$(?![\s$]|\d[\d.,]*\s+[a-z]{2})((?:\\[^]|[^$\\`])*?[^\s$\\]|[^\s$\\])\$(?![\d$])/iy, (m) => formula(m[1], false), "$", true],
  [/\\([\\`*_{}[\]()#+\-.!~|>$])/y, (m) => m[1]],
  [/(`+)(?!`)([^]*?[^`])\1(?!`)/y, (m) => h("code", {}, m[2].replace(/^ (.*) $/s, "$1").replace(/\n/g, " ")), "`"],
  [/!\[([^\]]*)\]\(\s*([^\s)]*)[^)]*\)/y, (m, d) => link(m[2], [m[1] || m[2]], m[0], d), "]("],
  [/\[\^([^\]\s]{1,40})\]/y, (m) => noteMark(m[1]), "]"],
  [/\[((?:[^[\]\\]|\\.|\[[^\]]*\])*)\]\(\s*<?((?:[^\s()<>]|\([^\s()]*\))*)>?(?:\s+["'(][^"')]*["')])?\s*\)/y,
    (m, d) => link(m[2], inline(m[1], d + 1), m[0]), "]("],
  [/<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy, (m) => link(m[1], [m[1]], m[0])],
  [/https?:\/\/[^\s<>"`*]*[^\s<>"`*.,;:!?')\]]/iy, (m) => link(m[0], [m[0]], m[0])],
  [/\*\*(?=\S)([^]*?\S)\*\*(?!\*)/y, (m, d) => h("strong", {}, ...inline(m[1], d + 1)), "**"],
  [/\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)/y, (m, d) => h("em", {}, ...inline(m[1], d + 1)), "*"],
  [/__(?=\S)([^]*?\S)__(?![\w_])/y, (m, d) => h("strong", {}, ...inline(m[1], d + 1)), "__", true],
  [/_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/y, (m, d) => h("em", {}, ...inline(m[1], d + 1)), "_", true],
  [/~~(?=\S)([^]*?\S)~~/y, (m, d) => h("del", {}, ...inline(m[1], d + 1)), "~~"],
  [/ {2,}\n|\n/y, () => h("br")],
];
const SPECIAL = /[\\`![<*_~$\n]|https?:\/\/| {2,}\n/gi;

export function inline(text, depth = 0) {
  const out = [];
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) out.push(plain);
    plain = "";
  };
  // An opening mark without an end is tried once only; otherwise many of them would take long.
  const unclosed = new Set();
  next: while (at < text.length) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    if (special === null || depth > MAX_DEPTH) {
      plain += text.slice(at);
      break;
    }
    plain += text.slice(at, special.index);
    at = special.index;
    for (const [number, [pattern, make, end, outsideWords]] of INLINE.entries()) {
      if (unclosed.has(number)) continue;
      if (outsideWords && at > 0 && /\w/.test(text[at - 1])) continue;
      pattern.lastIndex = at;
      const match = pattern.exec(text);
      if (match === null) {
        if (end && text.indexOf(end, at + 1) < 0) unclosed.add(number);
        continue;
      }
      const after = pattern.lastIndex; // `make` may use the same expression
      const node = make(match, depth);
      if (typeof node === "string") plain += node;
      else {
        flush();
        out.push(node);
      }
      at = after;
      continue next;
    }
    plain += text[at++];
  }
  flush();
  return out;
}

// The mark of a footnote shows the note.
function noteMark(name) {
  const button = h("button", { class: "link", type: "button", "aria-label": `Note ${name}` }, name);
  button.addEventListener("click", () => {
    const note = [...button.closest(".prose, .text").querySelectorAll(".note")].find((n) => n.dataset.note === name);
    note?.scrollIntoView({ block: "nearest" });
    note?.focus();
  });
  return h("sup", { class: "mark" }, button);
}

// Links with other schemes stay text.
function link(address, content, source) {
  if (!SAFE.test(address)) return h("span", {}, source);
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...content);
}
