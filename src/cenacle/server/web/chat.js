// The chat view: conversations, answers while they stream, and what can be done with both.

import * as api from "./api.js";
import { $, copyText, download, h, icon, iconButton, setIcon, toast } from "./dom.js";
import { render } from "./markdown.js";
import * as pictures from "./pictures.js";
import * as store from "./store.js";

let shown = store.newConversation();
let running = null; // the answer that streams: {conversation, message, control}
let editing = null; // index of the question that is being edited
let model = "";

const SHOWN_ENTRY = "cenacle.conversation";
const EXAMPLES = ["Explain what a mixture of experts is.", "What is 12 + 30?", "Write a haiku about rain."];

export function start() {
  shown = store.findConversation(sessionStorage.getItem(SHOWN_ENTRY)) ?? shown;
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stop();
    else submit();
  });
  const input = $("input");
  pictures.start(fitComposer);
  input.addEventListener("input", fitComposer);
  input.addEventListener("keydown", onKeyDown);
  $("new").addEventListener("click", () => { open(store.newConversation()); closeList(); });
  $("cancel-edit").addEventListener("click", () => cancelEdit());
  $("export-all").addEventListener("click", exportAll);
  $("open-list").addEventListener("click", () => ($("list").classList.contains("open") ? closeList() : openList()));
  $("shade").addEventListener("click", closeList);
  $("scroll-down").addEventListener("click", () => scrollToEnd(true));
  $("scroll").addEventListener("scroll", updateScrollButton, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (running) stop();
    else if (editing !== null) cancelEdit();
    else closeList();
  });
  addEventListener("storage", (event) => {
    if (event.key?.startsWith(store.ENTRY_PREFIX) && !running) {
      shown = store.findConversation(shown.id) ?? shown;
      showAll();
    }
  });
  showAll();
  scrollToEnd(true);
}

export function setModel(name) {
  model = name;
}

function open(conversation) {
  if (editing !== null) cancelEdit();
  shown = conversation;
  sessionStorage.setItem(SHOWN_ENTRY, shown.id);
  showAll();
  scrollToEnd(true);
  if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
}

// ---- asking

function onKeyDown(event) {
  const enter = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (enter && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    if (!running) submit();
  } else if (event.key === "ArrowUp" && !$("input").value && !running) {
    const last = shown.messages.findLastIndex((m) => m.role === "user");
    if (last >= 0) {
      event.preventDefault();
      edit(last);
    }
  }
}

function submit() {
  const text = $("input").value.trim();
  if (!(text || pictures.count()) || running) return;
  const images = pictures.take();
  if (editing !== null) shown.messages.length = editing;
  cancelEdit();
  shown.messages.push({ role: "user", content: text, ...(images.length ? { images } : {}) });
  $("input").value = "";
  fitComposer();
  ask();
}

async function ask() {
  const conversation = shown;
  const message = { role: "assistant", content: "" };
  const settings = store.settings();
  const history = conversation.messages.filter((m) => m.role === "user" || m.content)
    .map((m) => ({ role: m.role, content: pictures.contentOf(m) }));
  const options = ["temperature", "max_tokens", "seed"].filter((k) => settings[k] !== null).map((k) => [k, settings[k]]);
  const body = {
    messages: settings.system.trim() ? [{ role: "system", content: settings.system }, ...history] : history,
    ...Object.fromEntries(options),
  };
  conversation.messages.push(message);
  conversation.updatedAt = Date.now();
  sessionStorage.setItem(SHOWN_ENTRY, conversation.id);
  running = { conversation, message, control: new AbortController() };
  saveConversation(conversation);
  showAll();
  scrollToEnd(true);
  const clock = new AnswerClock();
  try {
    model ||= (await api.getJson("/v1/models")).data[0].id;
    for await (const event of api.streamChat({ model, ...body }, running.control.signal)) {
      if (event.text || event.reasoning) clock.addPiece();
      if (event.reasoning) message.reasoning = (message.reasoning ?? "") + event.reasoning;
      if (event.text) message.content += event.text;
      if (event.finish) message.finish = event.finish;
      if (event.usage) clock.usage = event.usage;
      scheduleUpdate(lastCostMs / SHARE_OF_TIME);
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error instanceof api.ServerError ? error.message : `Error in this page: ${error.message}`;
  }
  if (clock.first) message.stats = clock.stats();
  finishAnswer(conversation, message);
}

function finishAnswer(conversation, message) {
  running = null;
  conversation.updatedAt = Date.now();
  if (store.findConversation(conversation.id)) saveConversation(conversation); // unless it was deleted
  if (conversation !== shown) {
    showList();
    return;
  }
  const follow = isAtEnd();
  showAll();
  if (follow) scrollToEnd(true);
  $("announcement").textContent = message.error ?? (message.finish === "stopped" ? "Stopped." : "The answer is complete.");
}

// When the pieces of an answer came.
class AnswerClock {
  constructor() {
    this.start = performance.now();
    this.first = this.last = this.pieces = 0;
    this.usage = null; // the server's count of tokens
  }

  addPiece() {
    this.last = performance.now();
    this.first ||= this.last;
    this.pieces += 1;
  }

  stats() {
    const seconds = (this.last - this.first) / 1000; // too short for a rate when drafts arrive together
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    return {
      tokens,
      exact: this.usage !== null,
      first_s: (this.first - this.start) / 1000,
      per_s: seconds > 0.1 && tokens > 1 ? (tokens - 1) / seconds : null,
      prompt: this.usage?.prompt_tokens ?? null,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? 0,
    };
  }
}

function stop() {
  running?.control.abort();
}

function regenerate() {
  if (running) return;
  while (shown.messages.at(-1)?.role === "assistant") shown.messages.pop();
  if (shown.messages.length) ask();
}

function edit(index) {
  if (running) return;
  editing = index;
  $("editing").hidden = false;
  $("input").value = shown.messages[index].content;
  pictures.set([...(shown.messages[index].images ?? [])]);
  $("input").focus();
  showMessages();
}

function cancelEdit() {
  if (editing === null) return;
  editing = null;
  $("editing").hidden = true;
  $("input").value = "";
  pictures.set([]);
  showMessages();
}

function saveConversation(conversation) {
  if (!store.save(conversation)) toast("The browser's storage is full: export or delete conversations");
}

// ---- showing

const SHARE_OF_TIME = 0.25; // of drawing, while an answer streams

let planned = false;
let lastCostMs = 0;
function scheduleUpdate(delayMs = 0) {
  if (planned) return;
  planned = true;
  const update = () => requestAnimationFrame(() => {
    const began = performance.now();
    planned = false;
    if (running?.conversation !== shown) return;
    const follow = isAtEnd();
    showAnswer($("messages").lastElementChild, running.message, true);
    if (follow) scrollToEnd();
    updateScrollButton();
    lastCostMs = performance.now() - began;
  });
  if (delayMs > 16) setTimeout(update, delayMs);
  else update();
}

function showAll() {
  showMessages();
  showList();
  fitComposer();
}

function showMessages() {
  const box = $("messages");
  if (!shown.messages.length) {
    box.replaceChildren(h("div", { class: "empty" },
      h("img", { src: "/static/icon.svg", alt: "", width: 52, height: 52 }),
      h("h1", {}, "What would you like to know?"),
      h("p", {}, `${model || "The model"} runs on your own machines. Your messages stay there.`),
      h("div", { class: "examples" }, EXAMPLES.map((text) =>
        h("button", { type: "button", onclick: () => { $("input").value = text; submit(); } }, text)))));
    return;
  }
  box.replaceChildren(...shown.messages.map((message, index) =>
    message.role === "user" ? questionElement(message, index) : answerElement(message, index)));
  updateScrollButton();
}

function questionElement(message, index) {
  const last = index === shown.messages.findLastIndex((m) => m.role === "user");
  return h("article", { class: `message user${editing === index ? " edited" : ""}`, "aria-label": "You" },
    h("div", { class: "bubble" }, pictures.elements(message), message.content),
    h("div", { class: "tools" },
      last && !running && iconButton("edit", "Edit", () => edit(index)),
      iconButton("copy", "Copy", () => copyText(message.content))));
}

function answerElement(message, index) {
  const streaming = running?.message === message;
  const element = h("article", { class: "message assistant", "aria-label": "Model" },
    h("details", { class: "reasoning", hidden: true }, h("summary"), h("div", { class: "text" })),
    h("div", { class: "text prose" }),
    h("p", { class: "error", hidden: true }),
    h("div", { class: "foot" }));
  showAnswer(element, message, streaming, index === shown.messages.length - 1);
  return element;
}

function showAnswer(element, message, streaming, isLast = true) {
  const [reasoning, text, error, foot] = element.children;
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
  if (streaming) return;
  foot.replaceChildren(
    h("div", { class: "tools" },
      message.content && iconButton("copy", "Copy", () => copyText(message.content)),
      isLast && !running && iconButton("retry", message.error ? "Try again" : "Regenerate", regenerate)),
    h("span", { class: "stats" }, describeStats(message)));
}

function describeStats({ stats, finish }) {
  const parts = [];
  if (stats) {
    const about = stats.exact ? "" : "about ";
    if (stats.per_s) parts.push(`${about}${stats.per_s.toFixed(stats.per_s < 10 ? 1 : 0)} tokens/s`);
    parts.push(`first token after ${stats.first_s < 1 ? `${Math.round(1000 * stats.first_s)} ms` : `${stats.first_s.toFixed(1)} s`}`);
    parts.push(`${about}${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
    if (stats.cached) parts.push(`${stats.cached} of ${stats.prompt} prompt tokens cached`);
  }
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("reached the token limit");
  return parts.join(" · ");
}

function showList() {
  const all = store.conversations();
  $("conversations").replaceChildren(...all.map((conversation) => {
    const current = conversation.id === shown.id;
    const isAnswering = () => running?.conversation.id === conversation.id;
    return h("li", { class: current ? "current" : null },
      h("button", {
        class: "pick", type: "button", "aria-current": current ? "true" : null,
        onclick: () => { open(isAnswering() ? running.conversation : conversation); closeList(); },
      }, isAnswering() && h("span", { class: "pulse", "aria-label": "answering" }), h("span", {}, store.titleOf(conversation))),
      menuElements(conversation));
  }));
  if (!all.length) $("conversations").append(h("li", { class: "none" }, "No conversations yet"));
}

function menuElements(conversation) {
  const menu = h("div", { class: "menu", popover: "auto", id: `menu-${conversation.id}` },
    h("button", { type: "button", onclick: () => { menu.hidePopover(); rename(conversation, button.parentElement); } }, "Rename"),
    h("button", { type: "button", onclick: () => { menu.hidePopover(); download(`${fileName(conversation)}.md`, store.toMarkdown(conversation), "text/markdown"); } }, "Export as Markdown"),
    h("button", { type: "button", onclick: () => { menu.hidePopover(); download(`${fileName(conversation)}.json`, JSON.stringify(conversation, null, 1), "application/json"); } }, "Export as JSON"),
    h("button", { type: "button", class: "danger", onclick: () => { menu.hidePopover(); remove(conversation); } }, "Delete"));
  const button = h("button", { class: "icon", type: "button", "aria-haspopup": "menu" }, icon("more"));
  button.setAttribute("aria-label", `Options for ${store.titleOf(conversation)}`);
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

const fileName = (conversation) => store.titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";

function rename(conversation, row) {
  const field = h("input", { class: "rename", "aria-label": "New name", maxlength: 120 });
  field.value = store.titleOf(conversation);
  const finish = (saving) => {
    field.onblur = null;
    if (saving && field.value.trim()) {
      conversation.title = field.value.trim();
      if (conversation.id === shown.id) shown.title = conversation.title;
      saveConversation(conversation.id === shown.id ? shown : conversation);
    }
    showList();
  };
  field.onblur = () => finish(true);
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  row.replaceChildren(field);
  field.focus();
  field.select();
}

function remove(conversation) {
  if (running?.conversation.id === conversation.id) stop();
  store.remove(conversation.id);
  if (conversation.id === shown.id) open(store.newConversation());
  else showList();
  toast("Conversation deleted", "Undo", () => { store.save(conversation); open(conversation); });
}

function exportAll() {
  const all = store.conversations();
  if (!all.length) return toast("There are no conversations to export");
  download("cenacle-conversations.json", JSON.stringify(all, null, 1), "application/json");
}

// ---- the window

function fitComposer() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
  const send = $("send");
  setIcon(send, running ? "stop" : "send", running ? "Stop" : "Send");
  send.classList.toggle("stop", Boolean(running));
  send.disabled = !running && !input.value.trim() && !pictures.count();
}

function isAtEnd() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function scrollToEnd(now = false) {
  const box = $("scroll");
  box.scrollTo({ top: box.scrollHeight, behavior: now ? "instant" : "auto" });
}

function updateScrollButton() {
  $("scroll-down").hidden = isAtEnd();
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
