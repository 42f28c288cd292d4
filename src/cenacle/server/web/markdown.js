// Markdown to elements. Text becomes text nodes, elements come from a fixed set, links have one of
// three schemes; nothing is parsed as HTML or loaded from elsewhere.
//
// `blocks(text)` splits the top level. `render(parent, text)` keeps the elements of unchanged blocks,
// so that a streaming answer is cheap to draw and a selection in it stays.

import { copyText, h, iconButton, setIcon } from "./dom.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const CELLS = /^\s*\|?(?:\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/;
const MAX_DEPTH = 12; // of nested lists and quotes; deeper ones stay text

export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const result = [];
  let i = 0;
  const take = (kind, count, extra = {}) => {
    result.push({ kind, lines: lines.slice(i, i + count), ...extra });
    i += count;
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      i++;
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

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

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

export function render(parent, text) {
  const current = blocks(text);
  const sources = current.map(source);
  const previous = parent.rendered ?? [];
  let same = 0;
  while (same < sources.length && previous[same] === sources[same]) same++;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  for (const block of current.slice(same)) parent.append(element(block, 0));
  parent.rendered = sources;
}

const source = (block) => block.kind + (block.closed ?? "") + block.lines.join("\n");

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
      return h(`h${Math.min(6, marks.length + 1)}`, {}, ...inline(title ?? ""));
    }
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...nested(lines.map((l) => l.replace(QUOTE, "")), depth));
    case "list":
      return list(lines, depth);
    case "table":
      return table(lines);
    default:
      return h("p", {}, ...inline(lines.map((l) => l.replace(/^ +/, "")).join("\n")));
  }
}

function code({ lines, language, indent, closed }) {
  const strip = new RegExp(`^ {0,${indent}}`);
  const text = lines.slice(1, closed ? -1 : undefined).map((l) => l.replace(strip, "")).join("\n");
  const copy = iconButton("copy", "Copy the code", async () => {
    await copyText(text);
    setIcon(copy, "check", "Copied");
    setTimeout(() => setIcon(copy, "copy", "Copy the code"), 1500);
  });
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), copy),
    h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function list(lines, depth) {
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
  return h(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {},
    items.map((item) => {
      const children = nested(item.lines, depth);
      // A tight list has no paragraphs.
      const flat = loose ? children : children.flatMap((e) => (e.tagName === "P" ? [...e.childNodes] : [e]));
      return h("li", {}, ...flat);
    }));
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
  return h("div", { class: "wide", tabindex: "0" }, h("table", {},
    h("thead", {}, row(lines[0], "th")),
    h("tbody", {}, lines.slice(2).map((l) => row(l, "td")))));
}

// ---- inline

const SAFE = /^(?:https?:\/\/|mailto:)[^\s<>"]+$/i;
const INLINE = [
  // A sticky expression that must match at this position, and what it becomes; `true`: not within a word.
  [/\\([\\`*_{}[\]()#+\-.!~|>])/y, (m) => m[1]],
  [/(`+)(?!`)([^]*?[^`])\1(?!`)/y, (m) => h("code", {}, m[2].replace(/^ (.*) $/s, "$1").replace(/\n/g, " "))],
  [/!\[([^\]]*)\]\(\s*([^\s)]*)[^)]*\)/y, (m, d) => link(m[2], [m[1] || m[2]], m[0], d)],
  [/\[((?:[^[\]\\]|\\.|\[[^\]]*\])*)\]\(\s*<?((?:[^\s()<>]|\([^\s()]*\))*)>?(?:\s+["'(][^"')]*["')])?\s*\)/y,
    (m, d) => link(m[2], inline(m[1], d + 1), m[0])],
  [/<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy, (m) => link(m[1], [m[1]], m[0])],
  [/https?:\/\/[^\s<>"`*]*[^\s<>"`*.,;:!?')\]]/iy, (m) => link(m[0], [m[0]], m[0])],
  [/\*\*(?=\S)([^]*?\S)\*\*(?!\*)/y, (m, d) => h("strong", {}, ...inline(m[1], d + 1))],
  [/\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)/y, (m, d) => h("em", {}, ...inline(m[1], d + 1))],
  [/__(?=\S)([^]*?\S)__(?![\w_])/y, (m, d) => h("strong", {}, ...inline(m[1], d + 1)), true],
  [/_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/y, (m, d) => h("em", {}, ...inline(m[1], d + 1)), true],
  [/~~(?=\S)([^]*?\S)~~/y, (m, d) => h("del", {}, ...inline(m[1], d + 1))],
  [/ {2,}\n|\n/y, () => h("br")],
];
const SPECIAL = /[\\`![<*_~\n]|https?:\/\/| {2,}\n/gi;

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
    for (const [number, [pattern, make, outsideWords]] of INLINE.entries()) {
      if (unclosed.has(number)) continue;
      if (outsideWords && at > 0 && /\w/.test(text[at - 1])) continue;
      pattern.lastIndex = at;
      const match = pattern.exec(text);
      if (match === null) {
        if (isUnclosed(number, text, at)) unclosed.add(number);
        continue;
      }
      const end = pattern.lastIndex;
      const node = make(match, depth);
      if (typeof node === "string") plain += node;
      else {
        flush();
        out.push(node);
      }
      at = end;
      continue next;
    }
    plain += text[at++];
  }
  flush();
  return out;
}

// Whether the rest of the text has no end for this pattern.
const ENDS = { 1: "`", 2: "](", 3: "](", 6: "**", 7: "*", 8: "__", 9: "_", 10: "~~" };
function isUnclosed(number, text, at) {
  return number in ENDS && text.indexOf(ENDS[number], at + 1) < 0;
}

// Links with other schemes stay text.
function link(address, content, source) {
  if (!SAFE.test(address)) return h("span", {}, source);
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...content);
}
