// The chat view: asking, answers while they stream, branches, and what can be done with a conversation.

import * as api from "./api.js";
import * as attachments from "./attachments.js";
import { $, h, setIcon, toast } from "./dom.js";
import * as messages from "./messages.js";
import * as prompts from "./prompts.js";
import * as second from "./second.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import * as tools from "./tools.js";
import * as tree from "./tree.js";

let shown = tree.newConversation();
let running = []; // the answers that stream, of one conversation: {conversation, message, control}
let editing = null; // the question that is being edited
let models = []; // of /v1/models
let lost = []; // answers whose connections broke: {conversation, message, tries}

const SHOWN_ENTRY = "cenacle.conversation";
const EXAMPLES = ["Explain what a mixture of experts is.", "What is 12 + 30?", "Write a haiku about rain."];
const SAVE_MS = 3000; // between two writes of an answer that streams
const MOST_TRIES = 3; // of an answer whose connection breaks
const MOST_ROUNDS = 8; // of calls that the settings' results answer, one after the other

export async function start() {
  await store.open(onOtherWindow);
  shown = (await store.load(sessionStorage.getItem(SHOWN_ENTRY))) ?? shown;
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.length) stop();
    else submit();
  });
  const input = $("input");
  attachments.start(fitComposer);
  prompts.start({ conversation: () => shown, save: () => { saveConversation(shown); showAll(); }, insert });
  second.start({ models: () => models, model });
  sidebar.start({
    shown: () => shown, isAnswering: (id) => answering()?.id === id, pick, live,
    removed: (id) => { if (id === shown.id) open(tree.newConversation()); },
    stop: (id) => { if (answering()?.id === id) stop(); },
  });
  input.addEventListener("input", fitComposer);
  input.addEventListener("keydown", onKeyDown);
  $("new").addEventListener("click", () => { open({ ...tree.newConversation(), tags: sidebar.newTags() }); closeList(); });
  $("cancel-edit").addEventListener("click", () => cancelEdit());
  $("open-list").addEventListener("click", () => ($("list").classList.contains("open") ? closeList() : openList()));
  $("shade").addEventListener("click", closeList);
  $("open-keys").addEventListener("click", () => $("keys").showModal());
  $("scroll-down").addEventListener("click", () => scrollToEnd(true));
  $("scroll").addEventListener("scroll", updateScrollButton, { passive: true });
  document.addEventListener("keydown", onShortcut);
  if (!store.isLasting()) toast("This browser does not allow storage: conversations are lost when you close the page");
  showAll();
  scrollToEnd(true);
}

const answering = () => running[0]?.conversation;

export function setModels(list) {
  models = list;
  attachments.setModel(model());
  showMeter();
}

export const allModels = () => models;

// The chosen model, or the first.
export const model = () => models.find((m) => m.id === store.settings().model) ?? models[0];

// The server answers again: an answer that was cut off goes on.
export function onConnected() {
  if (running.length) return;
  const last = tree.path(shown).at(-1);
  const ends = tree.pairOf(shown, last) ?? [last];
  const again = lost.filter(({ conversation, message, tries }) => conversation === shown && ends.includes(message) && tries <= MOST_TRIES);
  if (!again.length) return;
  toast("Connected again: the answer goes on");
  lost = [];
  for (const { message, tries } of again) answer(shown, message, tries);
}

async function onOtherWindow(ids) {
  if (ids.includes(shown.id) && !running.length && editing === null) {
    const other = await store.load(shown.id);
    if (other && !running.length) {
      // The branch that is shown here stays, unless the other window went on from its end.
      if (shown.leaf && !tree.path(other).some((m) => m.id === shown.leaf)) other.leaf = shown.leaf;
      shown = other;
      showMessages();
    }
  }
  sidebar.show();
}

// The conversation that is worked with here, or the stored one.
async function live(id) {
  if (id === shown.id) return shown;
  if (id === answering()?.id) return answering();
  return store.load(id);
}

async function pick(id) {
  const conversation = await live(id);
  if (!conversation) return;
  open(conversation);
  closeList();
}

function open(conversation) {
  if (editing !== null) cancelEdit();
  shown = conversation;
  sessionStorage.setItem(SHOWN_ENTRY, shown.id);
  showAll();
  scrollToEnd(true);
  if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
}

// ---- keys

function onKeyDown(event) {
  const enter = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (enter && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    if (!running.length) submit();
  } else if (event.key === "ArrowUp" && !$("input").value && !running.length) {
    const last = tree.path(shown).findLast((m) => m.role === "user");
    if (last) {
      event.preventDefault();
      edit(last);
    }
  }
}

// Those that `?` lists.
function onShortcut(event) {
  if (document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  const typing = event.target.closest?.("input, textarea, select");
  const act = (action) => {
    event.preventDefault();
    if (location.hash === "#cluster") location.hash = "#chat";
    action();
  };
  if (event.key === "Escape") {
    if (running.length) stop();
    else if (editing !== null) cancelEdit();
    else closeList();
  } else if (event.key === "?" && !typing) act(() => $("keys").showModal());
  else if (command && event.key === "k") act(() => { openList(); $("search").focus(); });
  else if (command && event.shiftKey && event.key.toLowerCase() === "o") act(() => $("new").click());
  else if (command && event.key === ",") act(() => $("open-settings").click());
  else if (command && event.shiftKey && event.key.toLowerCase() === "y") act(() => prompts.show());
  else if (event.key === "/" && !typing) act(() => $("input").focus());
}

// ---- asking

function submit() {
  const text = $("input").value.trim();
  if (!(text || attachments.count()) || running.length) return;
  const parent = editing === null ? tree.path(shown).at(-1) : shown.messages.find((m) => m.id === editing.parent);
  const attached = attachments.take();
  cancelEdit();
  tree.decide(shown, parent);
  const question = tree.add(shown, { role: "user", content: text, ...attached }, parent);
  $("input").value = "";
  fitComposer();
  const made = tree.add(shown, { role: "assistant", content: "" }, question);
  if (store.settings().twice) addBeside(made);
  for (const message of tree.pairOf(shown, made) ?? [made]) answer(shown, message);
}

// An answer by the second setting beside `message`, without its text.
function addBeside(message) {
  const parent = shown.messages.find((m) => m.id === message.parent);
  const made = tree.add(shown, { role: "assistant", content: "", beside: message.id, variant: second.variant() }, parent);
  shown.leaf = message.id;
  return made;
}

async function answerBeside(message) {
  if (!(await second.ask(true)) || running.length) return;
  answer(shown, addBeside(message));
}

// What the settings, or instead of them the message's own, ask of the model.
function options(settings) {
  const numbers = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "thinking_budget"].filter((name) => settings[name] !== null);
  const body = Object.fromEntries(numbers.map((name) => [name, settings[name]]));
  const stop = settings.stop.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  if (settings.reasoning_effort) body.reasoning_effort = settings.reasoning_effort;
  const offered = tools.parse(settings.tools);
  if (offered.length) body.tools = tools.offered(offered);
  if (settings.schema.trim()) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
  return body;
}

// Asks for the text of `message`, an answer in `conversation`; what it has already is continued.
async function answer(conversation, message, tries = 0, rounds = 0) {
  const history = tree.path(conversation, message.parent);
  const settings = { ...store.settings(), ...message.variant };
  const system = message.variant?.system?.trim() || conversation.system.trim() || settings.system.trim();
  const body = {
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...history.filter((m) => m.role === "user" || m.content || m.calls?.length)
        .flatMap((m) => (m.calls?.length ? tools.asMessages(m.content, m.calls) : { role: m.role, content: attachments.contentOf(m) })),
    ],
  };
  if (message.content) {
    body.messages.push({ role: "assistant", content: message.content });
    Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  }
  delete message.error;
  message.finish = "streaming";
  const control = new AbortController();
  running.push({ conversation, message, control });
  lost = lost.filter((l) => l.message !== message);
  sessionStorage.setItem(SHOWN_ENTRY, conversation.id);
  saveAnswer(conversation, message);
  showAll();
  scrollToEnd(true);
  const clock = new AnswerClock(message.stats);
  let savedAt = performance.now();
  try {
    if (!models.length) setModels((await api.getJson("/v1/models")).data);
    const id = message.variant?.model ?? model().id;
    if (models.length > 1) message.model = id;
    for await (const event of api.streamChat({ model: id, ...body, ...options(settings) }, control.signal)) {
      if (event.text || event.reasoning) clock.addPiece((event.text ?? event.reasoning).length);
      if (event.reasoning) message.reasoning = (message.reasoning ?? "") + event.reasoning;
      if (event.calls) {
        tools.addPieces(message, event.calls);
        clock.addPiece(event.calls.reduce((sum, c) => sum + (c.function?.arguments?.length ?? 0), 1));
      }
      if (event.text) message.content += event.text;
      if (event.finish) message.finish = event.finish;
      if (event.usage) clock.usage = event.usage;
      scheduleUpdate(lastCostMs / SHARE_OF_TIME);
      if (performance.now() - savedAt > SAVE_MS) {
        savedAt = performance.now();
        saveAnswer(conversation, message);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error instanceof api.ServerError ? error.message : `Error in this page: ${error.message}`;
    if (error.wasLost) {
      lost.push({ conversation, message, tries: tries + 1 });
      dispatchEvent(new Event("connectionlost"));
    }
  }
  if (clock.first) message.stats = clock.stats();
  const complete = message.calls && !message.error && message.finish !== "stopped";
  if (complete) giveOwnResults(message, settings);
  finishAnswer(conversation, message);
  if (complete && !tree.pairOf(conversation, message)) goOnWithResults(conversation, message, rounds + 1);
}

// The results that tools have in the settings.
function giveOwnResults(message, settings) {
  const own = new Map(tools.parse(settings.tools).map((tool) => [tool.name, tool.result]));
  for (const call of message.calls) call.result ??= own.get(call.name);
}

// An answer to the results of calls, when all are there.
function goOnWithResults(conversation, message, rounds = 0) {
  if (running.length || rounds > MOST_ROUNDS || message.calls.some((c) => c.result === undefined) || !store.exists(conversation.id)) return;
  answer(conversation, tree.add(conversation, { role: "assistant", content: "", ...(message.variant ? { variant: message.variant } : {}) }, message), 0, rounds);
}

function giveResults(message, results) {
  if (running.length) return;
  tree.decide(shown, message);
  for (const [at, call] of message.calls.entries()) call.result = results[at];
  message.changedAt = Date.now();
  goOnWithResults(shown, message);
}

function finishAnswer(conversation, message) {
  running = running.filter((r) => r.message !== message);
  conversation.updatedAt = Date.now();
  if (store.exists(conversation.id)) saveAnswer(conversation, message); // unless it was deleted
  if (conversation !== shown) {
    sidebar.show();
    fitComposer();
    return;
  }
  const follow = isAtEnd();
  showAll();
  if (follow) scrollToEnd(true);
  if (!running.length) $("announcement").textContent = message.error ?? (message.finish === "stopped" ? "Stopped." : message.calls ? `The model calls ${message.calls.map((c) => c.name).join(", ")}.` : "The answer is complete.");
}

// When the pieces of an answer came.
class AnswerClock {
  constructor(earlier) {
    this.earlier = earlier; // of the part that is continued
    this.start = performance.now();
    this.first = this.last = this.pieces = 0;
    this.firstLength = this.length = 0; // in characters
    this.usage = null; // the server's count of tokens
  }

  addPiece(length) {
    this.last = performance.now();
    if (!this.first) {
      this.first = this.last;
      this.firstLength = length;
    }
    this.pieces += 1;
    this.length += length;
  }

  // The rate counts what came after the first piece, by its characters: several tokens can come at once, and an answer
  // that came in a few pieces has no rate.
  stats() {
    const seconds = (this.last - this.first) / 1000;
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const later = tokens * (1 - this.firstLength / this.length);
    return {
      tokens: tokens + (this.earlier?.tokens ?? 0),
      exact: this.usage !== null && (this.earlier?.exact ?? true),
      first_s: this.earlier?.first_s ?? (this.first - this.start) / 1000,
      per_s: seconds > 0.1 && this.pieces > 3 ? later / seconds : this.earlier?.per_s ?? null,
      prompt: this.usage?.prompt_tokens ?? null,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? 0,
    };
  }
}

function stop() {
  for (const { control } of running) control.abort();
}

// Another answer as a branch beside this one; in its place if it has nothing.
function regenerate(message) {
  if (running.length) return;
  if (!message.content && !message.reasoning && !message.calls) return void answer(shown, message);
  const parent = shown.messages.find((m) => m.id === message.parent);
  const pair = tree.pairOf(shown, message);
  const before = shown.leaf;
  const made = tree.add(shown, { role: "assistant", content: "", ...(message.variant ? { variant: message.variant } : {}) }, parent);
  if (pair) { // it takes the place among the two
    const isSecond = pair[1] === message;
    if (isSecond) made.beside = pair[0].id;
    pair[1].beside = isSecond ? null : made.id;
    pair[1].changedAt = Date.now();
    if (before !== message.id) shown.leaf = before;
  }
  answer(shown, made);
}

function decide(message) {
  if (running.length) return;
  tree.decide(shown, message);
  saveConversation(shown);
  showMessages();
  $("input").focus();
  if (message.calls) goOnWithResults(shown, message);
}

function proceed(message) {
  if (!running.length) answer(shown, message);
}

function choose(message) {
  tree.choose(shown, message);
  saveConversation(shown);
  showMessages();
}

function edit(message) {
  if (running.length) return;
  editing = message;
  $("editing").hidden = false;
  $("input").value = message.content;
  attachments.set(message);
  $("input").focus();
  showMessages();
}

function cancelEdit() {
  if (editing === null) return;
  editing = null;
  $("editing").hidden = true;
  $("input").value = "";
  attachments.set({});
  showMessages();
}

function insert(text) {
  const input = $("input");
  input.setRangeText(text, input.selectionStart, input.selectionEnd, "end");
  fitComposer();
  input.focus();
}

function saveAnswer(conversation, message) {
  message.changedAt = Date.now();
  saveConversation(conversation);
}

async function saveConversation(conversation) {
  if (!(await store.save(conversation))) toast("The browser's storage is full: export or delete conversations");
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
    if (answering() !== shown) return;
    const follow = isAtEnd();
    for (const { message } of running) messages.update(messages.shownElement(message), message, true);
    if (follow) scrollToEnd();
    updateScrollButton();
    lastCostMs = performance.now() - began;
  });
  if (delayMs > 16) setTimeout(update, delayMs);
  else update();
}

function showAll() {
  showMessages();
  sidebar.show();
  fitComposer();
}

function showMessages() {
  const box = $("messages");
  const list = tree.path(shown);
  const system = shown.system.trim() && h("button", { class: "system", type: "button", onclick: prompts.show },
    h("strong", {}, "System prompt"), h("span", { dir: "auto" }, shown.system.trim().slice(0, 200)));
  showMeter();
  if (!list.length) {
    box.replaceChildren(...[system].filter(Boolean), h("div", { class: "empty" },
      h("img", { src: "/static/icon.svg", alt: "", width: 52, height: 52 }),
      h("h1", {}, "What would you like to know?"),
      h("p", {}, `${model()?.id ?? "The model"} runs on your own machines. Your messages stay there.`),
      h("div", { class: "examples" }, EXAMPLES.map((text) =>
        h("button", { type: "button", onclick: () => { $("input").value = text; submit(); } }, text)))));
    return;
  }
  const view = {
    conversation: shown, running: answering() === shown ? running.map((r) => r.message) : [], busy: running.length > 0, editing,
    edit, choose, regenerate, proceed, answerBeside, decide, giveResults, configure: () => second.ask(false),
  };
  const wanted = [...[system].filter(Boolean), ...messages.elements(list, view)];
  // Those that stay are not moved: a selection in them, and where they were scrolled to, stay as well.
  const stays = new Set(wanted);
  for (const child of [...box.children]) if (!stays.has(child)) child.remove();
  for (const [index, element] of wanted.entries()) if (box.children[index] !== element) box.insertBefore(element, box.children[index] ?? null);
  updateScrollButton();
}

// How full the context is, as the server counted with the last answer.
function showMeter() {
  const last = tree.path(shown).findLast((m) => m.stats?.prompt);
  const limit = model()?.context_length;
  $("context").hidden = !(last && limit);
  if ($("context").hidden) return;
  const used = last.stats.prompt + last.stats.tokens;
  const meter = $("context").querySelector("meter");
  meter.max = limit;
  meter.high = 0.9 * limit;
  meter.value = Math.min(used, limit);
  const number = (value) => value.toLocaleString("en");
  $("context").querySelector("span").textContent = `${number(used)} of ${number(limit)} tokens of context`;
}

// ---- the window

function fitComposer() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
  const send = $("send");
  setIcon(send, running.length ? "stop" : "send", running.length ? "Stop" : "Send");
  send.classList.toggle("stop", running.length > 0);
  send.disabled = !running.length && !input.value.trim() && !attachments.count();
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
  $("search").focus();
}

function closeList() {
  if (!$("list").classList.contains("open")) return;
  $("list").classList.remove("open");
  $("shade").hidden = true;
  $("open-list").setAttribute("aria-expanded", "false");
  if (document.activeElement?.closest("#list")) $("open-list").focus();
}
