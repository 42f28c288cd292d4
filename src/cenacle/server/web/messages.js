// The messages of a conversation as elements. An element stays while nothing about its message changes.

import * as attachments from "./attachments.js";
import { copyText, h, iconButton } from "./dom.js";
import { render } from "./markdown.js";
import * as tree from "./tree.js";

const made = new WeakMap(); // message -> {signature, element}

// The elements of messages. `view`: {conversation, running (a message), editing (a message)} and what the buttons
// do: edit, choose, regenerate, proceed.
export function elements(messages, view) {
  return messages.map((message, index) => {
    const same = tree.siblings(view.conversation, message);
    const state = [index === messages.length - 1, view.running === message, Boolean(view.running), view.editing === message, same.length, same.indexOf(message),
      message.changedAt, message.content.length, message.reasoning?.length, message.finish, message.error, message.files?.length, message.images?.length];
    const signature = JSON.stringify(state);
    const before = made.get(message);
    if (before?.signature === signature) return before.element;
    const isLast = index === messages.length - 1;
    const element = message.role === "user" ? question(message, same, view) : answer(message, same, isLast, view, before?.element);
    made.set(message, { signature, element });
    return element;
  });
}

// ‹ 2/3 ›
function branches(message, same, view) {
  if (same.length < 2) return null;
  const at = same.indexOf(message);
  const go = (name, label, target) => {
    const button = iconButton(name, label, () => view.choose(target));
    button.disabled = !target || Boolean(view.running);
    return button;
  };
  return h("div", { class: "branches", role: "group", "aria-label": "Branches" },
    go("back", "Previous branch", same[at - 1]), h("span", {}, `${at + 1}/${same.length}`), go("forward", "Next branch", same[at + 1]));
}

function question(message, same, view) {
  return h("article", { class: `message user${view.editing === message ? " edited" : ""}`, "aria-label": "You" },
    h("div", { class: "bubble", dir: "auto" }, attachments.elements(message), message.content),
    h("div", { class: "tools" },
      branches(message, same, view),
      !view.running && iconButton("edit", "Edit", () => view.edit(message)),
      iconButton("copy", "Copy", () => copyText(message.content))));
}

function answer(message, same, isLast, view, before) {
  const element = before ?? h("article", { class: "message assistant", "aria-label": "Model" },
    h("details", { class: "reasoning", hidden: true }, h("summary"), h("div", { class: "text" })),
    h("div", { class: "text prose" }),
    h("p", { class: "error", hidden: true }),
    h("div", { class: "foot" }));
  const streaming = view.running === message;
  update(element, message, streaming);
  const foot = element.lastChild;
  if (streaming) {
    foot.replaceChildren();
    return element;
  }
  const cut = ["length", "stopped", "streaming"].includes(message.finish) || message.error;
  foot.replaceChildren(
    h("div", { class: "tools" },
      branches(message, same, view),
      message.content && iconButton("copy", "Copy", () => copyText(message.content)),
      !view.running && iconButton("retry", message.error ? "Try again" : "Regenerate", () => view.regenerate(message)),
      isLast && cut && message.content && !view.running && h("button", { class: "continue", type: "button", onclick: () => view.proceed(message) }, "Continue")),
    h("span", { class: "stats" }, describeStats(message)));
  return element;
}

export function update(element, message, streaming) {
  const [reasoning, text, error] = element.children;
  reasoning.hidden = !message.reasoning;
  if (message.reasoning) {
    reasoning.firstChild.textContent = streaming && !message.content ? "Thinking…" : "Reasoning";
    render(reasoning.lastChild, message.reasoning);
  }
  element.classList.toggle("streaming", streaming);
  element.classList.toggle("waiting", streaming && !message.content && !message.reasoning);
  render(text, message.content);
  error.hidden = !message.error;
  error.textContent = message.error ?? "";
}

function describeStats({ stats, finish, model }) {
  const parts = [];
  if (stats) {
    const about = stats.exact ? "" : "about ";
    if (stats.per_s) parts.push(`${about}${stats.per_s.toFixed(stats.per_s < 10 ? 1 : 0)} tokens/s`);
    parts.push(`first token after ${stats.first_s < 1 ? `${Math.round(1000 * stats.first_s)} ms` : `${stats.first_s.toFixed(1)} s`}`);
    parts.push(`${about}${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
    if (stats.cached) parts.push(`${stats.cached} of ${stats.prompt} prompt tokens cached`);
  }
  if (model) parts.push(model);
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("reached the token limit");
  if (finish === "streaming") parts.push("not complete");
  return parts.join(" · ");
}
