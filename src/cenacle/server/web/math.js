// Formulas: KaTeX, loaded when the first one is shown. Until then, and where it finds an error, the source is shown.

import { h } from "./dom.js";

const MOST_CHARACTERS = 5000; // of a formula
const OPTIONS = { throwOnError: true, trust: false, strict: "ignore", maxExpand: 300, maxSize: 30 };

let katex = null;
let loading = null;
const waiting = new Set(); // elements to draw once it is there

async function load() {
  const sheet = h("link", { rel: "stylesheet", href: "/static/katex/katex.min.css" });
  document.head.append(sheet);
  await import("/static/katex/katex.min.js");
  ({ katex } = self);
  for (const element of waiting) draw(element);
  waiting.clear();
}

export function formula(tex, display) {
  const element = h("span", { class: display ? "math display" : "math", ...(display ? { tabindex: "0" } : {}) }, tex);
  element.tex = tex;
  if (katex) draw(element);
  else {
    waiting.add(element);
    loading ??= load().catch(() => { loading = null; }); // the next formula tries again
  }
  return element;
}

function draw(element) {
  const { tex } = element;
  if (tex.length > MOST_CHARACTERS) return;
  try {
    const tree = katex.__renderToDomTree(tex, { ...OPTIONS, displayMode: element.classList.contains("display") });
    const styled = [];
    takeStyles(tree, styled);
    const node = tree.toNode();
    for (const part of node.querySelectorAll("[data-styled]")) {
      part.style.cssText = styled[part.dataset.styled];
      delete part.dataset.styled;
    }
    element.replaceChildren(node);
  } catch (error) {
    element.classList.add("wrong");
    element.title = String(error.message ?? error);
  }
}

// The page's policy forbids the attribute `style`: such styles are set on the finished elements instead.
function takeStyles(tree, styled) {
  if (tree.attributes?.style) {
    tree.attributes["data-styled"] = String(styled.push(tree.attributes.style) - 1);
    delete tree.attributes.style;
  }
  for (const child of tree.children ?? []) takeStyles(child, styled);
}
