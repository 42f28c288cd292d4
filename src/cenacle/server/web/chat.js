// The conversations: what was asked, the answer as it comes, and what can be done with both.

import * as api from "./api.js";
import { $, copyText, download, h, icon, iconButton, setIcon, toast } from "./dom.js";
import { render } from "./markdown.js";
import * as store from "./store.js";

let talk = store.newConversation(); // the one that is shown
let running = null; // the answer that is coming: {talk, message, control}
let editing = null; // index of the question that is being edited
let model = "";

const EXAMPLES = ["Explain what a mixture of experts is.", "What is 12 + 30?", "Write a haiku about rain."];

export function start() {
  const last = sessionStorage.getItem("cenacle.talk");
  talk = store.conversations().find((t) => t.id === last) ?? talk;
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stop();
    else submit();
  });
  const input = $("input");
  input.addEventListener("input", fit);
  input.addEventListener("keydown", typed);
  $("new").addEventListener("click", () => { open(store.newConversation()); closeList(); });
  $("cancel-edit").addEventListener("click", () => cancelEdit());
  $("export-all").addEventListener("click", exportAll);
  $("open-list").addEventListener("click", () => ($("list").classList.contains("open") ? closeList() : openList()));
  $("shade").addEventListener("click", closeList);
  $("down").addEventListener("click", () => toEnd(true));
  $("scroll").addEventListener("scroll", showDown, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (running) stop();
    else if (editing !== null) cancelEdit();
    else closeList();
  });
  addEventListener("storage", (event) => {
    if (event.key?.startsWith("cenacle.talk.") && !running) {
      talk = store.conversations().find((t) => t.id === talk.id) ?? talk;
      showAll();
    }
  });
  showAll();
  toEnd(true);
}

export function setModel(name) {
  model = name;
}

function open(other) {
  if (editing !== null) cancelEdit();
  talk = other;
  sessionStorage.setItem("cenacle.talk", talk.id);
  showAll();
  toEnd(true);
  if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
}

// ---- asking

function typed(event) {
  const enter = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (enter && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    if (!running) submit();
  } else if (event.key === "ArrowUp" && !$("input").value && !running) {
    const last = talk.messages.findLastIndex((m) => m.role === "user");
    if (last >= 0) {
      event.preventDefault();
      edit(last);
    }
  }
}

function submit() {
  const text = $("input").value.trim();
  if (!text || running) return;
  if (editing !== null) talk.messages.length = editing;
  cancelEdit();
  talk.messages.push({ role: "user", content: text });
  $("input").value = "";
  fit();
  ask();
}

async function ask() {
  const asked = talk;
  const message = { role: "assistant", content: "" };
  const setup = store.settings();
  const history = asked.messages.filter((m) => m.role === "user" || m.content)
    .map(({ role, content }) => ({ role, content }));
  const body = {
    messages: setup.system.trim() ? [{ role: "system", content: setup.system }, ...history] : history,
    ...Object.fromEntries(["temperature", "max_tokens", "seed"].filter((k) => setup[k] !== null).map((k) => [k, setup[k]])),
  };
  asked.messages.push(message);
  asked.at = Date.now();
  sessionStorage.setItem("cenacle.talk", asked.id);
  running = { talk: asked, message, control: new AbortController() };
  keep(asked);
  showAll();
  toEnd(true);
  const began = performance.now();
  let first = 0;
  let last = 0;
  let pieces = 0;
  let counted = null;
  try {
    model ||= (await api.json("/v1/models")).data[0].id;
    for await (const event of api.answer({ model, ...body }, running.control.signal)) {
      if (event.text || event.thought) {
        last = performance.now();
        first ||= last;
        pieces += 1;
      }
      if (event.thought) message.thought = (message.thought ?? "") + event.thought;
      if (event.text) message.content += event.text;
      if (event.finish) message.finish = event.finish;
      if (event.usage) counted = event.usage;
      soon();
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error instanceof api.ServerError ? error.message : `Something went wrong here: ${error.message}`;
  }
  if (first) {
    const tokens = counted?.completion_tokens ?? pieces;
    message.stats = {
      tokens,
      exact: counted !== null,
      first_s: (first - began) / 1000,
      per_s: last > first && tokens > 1 ? (1000 * (tokens - 1)) / (last - first) : null,
      prompt: counted?.prompt_tokens ?? null,
      cached: counted?.prompt_tokens_details?.cached_tokens ?? 0,
    };
  }
  running = null;
  asked.at = Date.now();
  if (store.conversations().some((t) => t.id === asked.id)) keep(asked); // unless it was deleted
  if (asked === talk) {
    const follow = atEnd();
    showAll();
    if (follow) toEnd(true);
    $("said").textContent = message.error ?? (message.finish === "stopped" ? "Stopped." : "The answer is complete.");
  } else {
    showList();
  }
}

function stop() {
  running?.control.abort();
}

function again() {
  if (running) return;
  while (talk.messages.at(-1)?.role === "assistant") talk.messages.pop();
  if (talk.messages.length) ask();
}

function edit(index) {
  if (running) return;
  editing = index;
  $("editing").hidden = false;
  $("input").value = talk.messages[index].content;
  fit();
  $("input").focus();
  showMessages();
}

function cancelEdit() {
  if (editing === null) return;
  editing = null;
  $("editing").hidden = true;
  $("input").value = "";
  fit();
  showMessages();
}

function keep(which) {
  if (!store.save(which)) toast("This browser keeps no more: export or delete conversations");
}

// ---- showing

let frame = 0;
function soon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (running?.talk !== talk) return;
    const follow = atEnd();
    showAnswer($("messages").lastElementChild, running.message, true);
    if (follow) toEnd();
    showDown();
  });
}

function showAll() {
  showMessages();
  showList();
  fit();
}

function showMessages() {
  const box = $("messages");
  if (!talk.messages.length) {
    box.replaceChildren(h("div", { class: "empty" },
      h("img", { src: "/static/icon.svg", alt: "", width: 52, height: 52 }),
      h("h1", {}, "What would you like to know?"),
      h("p", {}, `${model || "The model"} answers on your own machines. Nothing leaves them.`),
      h("div", { class: "examples" }, EXAMPLES.map((text) =>
        h("button", { type: "button", onclick: () => { $("input").value = text; submit(); } }, text)))));
    return;
  }
  box.replaceChildren(...talk.messages.map((message, index) =>
    message.role === "user" ? question(message, index) : answerOf(message, index)));
  showDown();
}

function question(message, index) {
  const last = index === talk.messages.findLastIndex((m) => m.role === "user");
  return h("article", { class: `message user${editing === index ? " edited" : ""}`, "aria-label": "You" },
    h("div", { class: "bubble" }, message.content),
    h("div", { class: "tools" },
      last && !running && iconButton("edit", "Edit", () => edit(index)),
      iconButton("copy", "Copy", () => copyText(message.content))));
}

function answerOf(message, index) {
  const live = running?.message === message;
  const element = h("article", { class: "message model-said", "aria-label": "Model" },
    h("details", { class: "thought", hidden: true }, h("summary"), h("div", { class: "text" })),
    h("div", { class: "text prose" }),
    h("p", { class: "failed", hidden: true }),
    h("div", { class: "foot" }));
  showAnswer(element, message, live, index === talk.messages.length - 1);
  return element;
}

function showAnswer(element, message, live, last = true) {
  const [thought, text, failed, foot] = element.children;
  thought.hidden = !message.thought;
  if (message.thought) {
    const thinking = live && !message.content;
    thought.firstChild.textContent = thinking ? "Thinking…" : "Thoughts";
    render(thought.lastChild, message.thought);
  }
  element.classList.toggle("live", live);
  element.classList.toggle("waiting", live && !message.content && !message.thought);
  render(text, message.content);
  failed.hidden = !message.error;
  failed.textContent = message.error ?? "";
  if (live) return;
  foot.replaceChildren(
    h("div", { class: "tools" },
      message.content && iconButton("copy", "Copy", () => copyText(message.content)),
      last && !running && iconButton("again", message.error ? "Try again" : "Regenerate", again)),
    h("span", { class: "stats" }, statsOf(message)));
}

function statsOf({ stats, finish }) {
  const parts = [];
  if (stats) {
    const about = stats.exact ? "" : "about ";
    if (stats.per_s) parts.push(`${about}${stats.per_s.toFixed(stats.per_s < 10 ? 1 : 0)} tokens/s`);
    parts.push(`first after ${stats.first_s < 1 ? `${Math.round(1000 * stats.first_s)} ms` : `${stats.first_s.toFixed(1)} s`}`);
    parts.push(`${about}${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
    if (stats.cached) parts.push(`${stats.cached} of ${stats.prompt} prompt tokens remembered`);
  }
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut at the most tokens");
  return parts.join(" · ");
}

function showList() {
  const all = store.conversations();
  $("conversations").replaceChildren(...all.map((other) => {
    const current = other.id === talk.id;
    const row = h("li", { class: current ? "current" : null },
      h("button", {
        class: "pick", type: "button", "aria-current": current ? "true" : null,
        onclick: () => { open(running?.talk.id === other.id ? running.talk : other); closeList(); },
      }, running?.talk.id === other.id && h("span", { class: "pulse", "aria-label": "answering" }), h("span", {}, store.titleOf(other))),
      menuOf(other));
    return row;
  }));
  if (!all.length) $("conversations").append(h("li", { class: "none" }, "No conversations yet"));
}

function menuOf(other) {
  const menu = h("div", { class: "menu", popover: "auto", id: `menu-${other.id}` },
    h("button", { type: "button", onclick: () => { menu.hidePopover(); rename(other, button.parentElement); } }, "Rename"),
    h("button", { type: "button", onclick: () => { menu.hidePopover(); download(`${fileName(other)}.md`, store.asMarkdown(other), "text/markdown"); } }, "Export as Markdown"),
    h("button", { type: "button", onclick: () => { menu.hidePopover(); download(`${fileName(other)}.json`, JSON.stringify(other, null, 1), "application/json"); } }, "Export as JSON"),
    h("button", { type: "button", class: "danger", onclick: () => { menu.hidePopover(); remove(other); } }, "Delete"));
  const button = h("button", { class: "icon", type: "button", "aria-haspopup": "menu" }, icon("more"));
  button.setAttribute("aria-label", `More about ${store.titleOf(other)}`);
  button.popoverTargetElement = menu;
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "open") return;
    const box = button.getBoundingClientRect();
    const height = menu.offsetHeight;
    menu.style.left = `${Math.max(8, Math.min(box.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 8))}px`;
    menu.style.top = `${box.bottom + 4 + height > innerHeight ? box.top - height - 4 : box.bottom + 4}px`;
  });
  return [button, menu];
}

const fileName = (other) => store.titleOf(other).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";

function rename(other, row) {
  const field = h("input", { class: "rename", "aria-label": "New name", maxlength: 120 });
  field.value = store.titleOf(other);
  const done = (saving) => {
    field.onblur = null;
    if (saving && field.value.trim()) {
      other.title = field.value.trim();
      if (other.id === talk.id) talk.title = other.title;
      keep(other.id === talk.id ? talk : other);
    }
    showList();
  };
  field.onblur = () => done(true);
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") done(true);
    if (event.key === "Escape") done(false);
  });
  row.replaceChildren(field);
  field.focus();
  field.select();
}

function remove(other) {
  if (running?.talk.id === other.id) stop();
  store.remove(other.id);
  if (other.id === talk.id) open(store.newConversation());
  else showList();
  toast("Conversation deleted", "Undo", () => { store.save(other); open(other); });
}

function exportAll() {
  const all = store.conversations();
  if (!all.length) return toast("There is nothing to export yet");
  download("cenacle-conversations.json", JSON.stringify(all, null, 1), "application/json");
}

// ---- the window

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
  const send = $("send");
  setIcon(send, running ? "stop" : "send", running ? "Stop" : "Send");
  send.classList.toggle("stop", Boolean(running));
  send.disabled = !running && !input.value.trim();
}

function atEnd() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function toEnd(now = false) {
  const box = $("scroll");
  box.scrollTo({ top: box.scrollHeight, behavior: now ? "instant" : "auto" });
}

function showDown() {
  $("down").hidden = atEnd();
}

function openList() {
  $("list").classList.add("open");
  $("shade").hidden = false;
  $("open-list").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeList() {
  if (!$("list").classList.contains("open")) return;
  $("list").classList.remove("open");
  $("shade").hidden = true;
  $("open-list").setAttribute("aria-expanded", "false");
  $("open-list").focus();
}
