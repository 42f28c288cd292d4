// The messages of a conversation as elements. An element stays while nothing about its message changes.

import * as attachments from "./attachments.js";
import { canShare, copyText, h, iconButton, share } from "./dom.js";
import { render } from "./markdown.js";
import * as tools from "./tools.js";
import * as tree from "./tree.js";

const made = new WeakMap(); // message -> {signature, element}

// The elements of messages. `view`: {conversation, running (messages), busy, editing (a message)} and what the buttons
// do: edit, choose, regenerate, proceed, answerBeside, decide, configure, giveResults.
export function elements(messages, view) {
  const pair = tree.pairOf(view.conversation, messages.at(-1));
  const single = pair ? messages.slice(0, -1) : messages;
  const list = single.map((message, index) => elementOf(message, view, !pair && index === single.length - 1, false));
  return pair ? [...list, columns(pair, view)] : list;
}

// The element that shows a message now.
export const shownElement = (message) => made.get(message)?.element;

function elementOf(message, view, isLast, isBeside) {
  const same = tree.siblings(view.conversation, message);
  const state = [isLast, isBeside, view.running.includes(message), view.busy, view.editing === message, same.length, same.indexOf(message),
    message.changedAt, message.content.length, message.reasoning?.length, message.finish, message.error, message.calls, message.files?.length, message.images?.length];
  const signature = JSON.stringify(state);
  const before = made.get(message);
  if (before?.signature === signature) return before.element;
  const element = message.role === "user" ? question(message, same, view) : answer(message, same, isLast, isBeside, view, before?.element);
  made.set(message, { signature, element });
  return element;
}

const pairs = new WeakMap(); // second message -> {signature, element}

// Two answers beside each other: one of them is chosen before the conversation goes on.
function columns([first, second], view) {
  const articles = [first, second].map((message) => elementOf(message, view, true, true));
  const labels = [first, second].map(({ variant, model }) => (variant && Object.keys(variant).length ? tree.describeVariant(variant) : model ?? "your settings"));
  const before = pairs.get(second);
  const signature = JSON.stringify([first.id, labels, view.busy]);
  if (before?.signature === signature && articles.every((article, at) => before.element.children[at].lastChild === article)) return before.element;
  const element = before?.element ?? h("div", { class: "pair", role: "group", "aria-label": "Two answers" },
    h("section", { class: "column" }), h("section", { class: "column" }),
    h("p", { class: "hint" }));
  for (const [at, message] of [first, second].entries()) {
    const column = element.children[at];
    column.setAttribute("aria-label", `Answer ${at + 1}: ${labels[at]}`);
    column.querySelector(".column-head")?.remove();
    column.prepend(h("div", { class: "column-head" },
      h("span", { class: "label", dir: "auto", title: labels[at] }, labels[at]),
      !view.busy && h("button", { class: "decide", type: "button", onclick: () => view.decide(message) }, "Go on with this one")));
    if (column.lastChild !== articles[at]) column.append(articles[at]);
    for (const child of [...column.children].slice(1, -1)) child.remove();
  }
  element.lastChild.replaceChildren("Without a choice, the next question goes on with the first answer. ",
    h("button", { class: "link", type: "button", onclick: () => view.configure() }, "Change the second setting"));
  pairs.set(second, { signature, element });
  return element;
}

// ‹ 2/3 ›
function branches(message, same, view) {
  if (same.length < 2) return null;
  const at = same.indexOf(message);
  const go = (name, label, target) => {
    const button = iconButton(name, label, () => view.choose(target));
    button.disabled = !target || view.busy;
    return button;
  };
  return h("div", { class: "branches", role: "group", "aria-label": "Branches" },
    go("back", "Previous branch", same[at - 1]), h("span", {}, `${at + 1}/${same.length}`), go("forward", "Next branch", same[at + 1]));
}

function question(message, same, view) {
  return h("article", { class: `message user${view.editing === message ? " edited" : ""}`, "aria-label": "You" },
    h("h2", { class: "visually-hidden" }, "You"),
    h("div", { class: "bubble", dir: "auto" }, attachments.elements(message), message.content),
    h("div", { class: "tools" },
      branches(message, same, view),
      !view.busy && iconButton("edit", "Edit", () => view.edit(message)),
      iconButton("copy", "Copy", () => copyText(message.content))));
}

function answer(message, same, isLast, isBeside, view, before) {
  const element = before ?? h("article", { class: "message assistant", "aria-label": "Model" },
    h("h2", { class: "visually-hidden" }, "Model"),
    h("details", { class: "reasoning", hidden: true }, h("summary"), h("div", { class: "text" })),
    h("div", { class: "text prose" }),
    h("div", { class: "calls", hidden: true }),
    h("p", { class: "error", hidden: true }),
    h("div", { class: "foot" }));
  const streaming = view.running.includes(message);
  update(element, message, streaming);
  const wanted = isLast && !view.busy && message.finish !== "streaming";
  tools.show(element.children[3], message.calls ?? [], wanted && ((results) => view.giveResults(message, results)));
  const foot = element.lastChild;
  if (streaming) {
    foot.replaceChildren();
    return element;
  }
  const cut = ["length", "stopped", "streaming"].includes(message.finish) || message.error;
  foot.replaceChildren(
    h("div", { class: "tools" },
      !isBeside && branches(message, same, view),
      message.content && iconButton("copy", "Copy", () => copyText(message.content)),
      message.content && canShare() && iconButton("share", "Share", () => share("", message.content)),
      !view.busy && iconButton("retry", message.error ? "Try again" : "Regenerate", () => view.regenerate(message)),
      isLast && !isBeside && !view.busy && (message.content || message.reasoning || message.calls) && iconButton("columns", "Another answer beside this one", () => view.answerBeside(message)),
      isLast && cut && message.content && !message.calls && !view.busy && h("button", { class: "continue", type: "button", onclick: () => view.proceed(message) }, "Continue")),
    h("span", { class: "stats" }, describeStats(message, isBeside)));
  return element;
}

export function update(element, message, streaming) {
  const [, reasoning, text, calls, error] = element.children;
  reasoning.hidden = !message.reasoning;
  if (message.reasoning) {
    reasoning.firstChild.textContent = streaming && !message.content ? "Thinking…" : "Reasoning";
    render(reasoning.lastChild, message.reasoning);
  }
  element.classList.toggle("streaming", streaming);
  element.classList.toggle("waiting", streaming && !message.content && !message.reasoning && !message.calls);
  calls.hidden = !message.calls?.length;
  if (streaming) tools.show(calls, message.calls ?? [], null);
  render(text, message.content);
  error.hidden = !message.error;
  error.textContent = message.error ?? "";
}

function describeStats({ stats, finish, model, variant }, isBeside) {
  const parts = [];
  if (stats) {
    const about = stats.exact ? "" : "about ";
    if (stats.per_s) parts.push(`${about}${stats.per_s.toFixed(stats.per_s < 10 ? 1 : 0)} tokens/s`);
    parts.push(`first token after ${stats.first_s < 1 ? `${Math.round(1000 * stats.first_s)} ms` : `${stats.first_s.toFixed(1)} s`}`);
    parts.push(`${about}${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
    if (stats.cached) parts.push(`${stats.cached} of ${stats.prompt} prompt tokens cached`);
  }
  if (model && !isBeside) parts.push(model);
  if (variant && !isBeside) parts.push(tree.describeVariant({ ...variant, model: undefined }));
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("reached the token limit");
  if (finish === "streaming") parts.push("not complete");
  return parts.join(" · ");
}
