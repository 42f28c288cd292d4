// What the browser stores. Settings, templates and the API key are in localStorage; conversations, which grow, in
// IndexedDB: whole in one store, and their heads (title, time) in another, so that a list of thousands is quick.
// Heads are in memory as well. A conversation that two windows write is merged: messages are never removed.

import * as tree from "./tree.js";

const PREFIX = "cenacle.";
const DEFAULTS = {
  system: "", temperature: null, top_p: null, top_k: null, min_p: null, seed: null, max_tokens: null, thinking_budget: null,
  stop: "", reasoning_effort: "", schema: "", tools: "", model: "", theme: "auto", wrap: false,
  second: {}, twice: false, // of a second answer: what it has instead of these; whether every question gets one
};

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback; // damaged, or storage is not allowed
  }
}

function write(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or not allowed
  }
}

export const settings = () => ({ ...DEFAULTS, ...read("settings", {}) });
export const saveSettings = (value) => write("settings", value);
export const key = () => read("key", "");
export const saveKey = (value) => write("key", value);
// [{name, text}], by name.
export const templates = () => read("templates", []).filter((t) => typeof t?.name === "string" && typeof t.text === "string");
export const saveTemplates = (value) => write("templates", value.toSorted((a, b) => a.name.localeCompare(b.name)));

// ---- conversations

const OLD_PREFIX = `${PREFIX}conversation.`; // where earlier versions kept them
const SCAN = 50; // conversations that a search holds at once

let database = null; // null: storage is not allowed, all is lost with the page
const memory = new Map(); // conversations, without a database
const known = new Map(); // heads by id
let pending = 0; // writes that have not ended
let onChange = () => {}; // called with the ids that another window changed
const channel = "BroadcastChannel" in self ? new BroadcastChannel("cenacle") : null;

const promised = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const ended = (transaction) => new Promise((resolve, reject) => {
  transaction.oncomplete = () => resolve();
  transaction.onerror = transaction.onabort = () => reject(transaction.error);
});

// Opens the database, with the conversations of earlier versions in it. `changed(ids)`: another window wrote them.
export async function open(changed) {
  onChange = changed;
  try {
    const request = indexedDB.open("cenacle", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("heads", { keyPath: "id" });
    };
    database = await promised(request);
    database.onversionchange = () => database.close();
    for (const head of await promised(database.transaction("heads").objectStore("heads").getAll())) known.set(head.id, head);
  } catch {
    database = null;
  }
  await takeOldEntries();
  channel?.addEventListener("message", async ({ data: ids }) => {
    for (const id of ids) {
      const head = database && (await promised(database.transaction("heads").objectStore("heads").get(id)));
      if (head) known.set(id, head);
      else known.delete(id);
    }
    onChange(ids);
  });
  // Else a browser that runs out of space may remove them.
  navigator.storage?.persist?.().catch(() => {});
}

async function takeOldEntries() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(OLD_PREFIX));
  const old = new Map(names.map((name) => [name, tree.clean(read(name.slice(PREFIX.length), null))]).filter(([, c]) => c !== null));
  if (!old.size || !(await saveAll([...old.values()])) || !database) return; // they stay where they are
  for (const name of old.keys()) localStorage.removeItem(name);
}

export const isLasting = () => database !== null;

// Pinned ones first, then the newest.
export const heads = () => [...known.values()].sort((a, b) => Boolean(b.pinned) - Boolean(a.pinned) || b.updatedAt - a.updatedAt);
// [[tag, how many conversations have it]], by name. Heads of earlier versions have no tags.
export function tags() {
  const counts = new Map();
  for (const head of known.values()) for (const tag of head.tags ?? []) counts.set(tag, (counts.get(tag) ?? 0) + 1);
  return [...counts].sort(([a], [b]) => a.localeCompare(b));
}

export const exists = (id) => known.has(id);

export async function load(id) {
  if (!id || !known.has(id)) return null;
  if (!database) return memory.get(id);
  return tree.clean(await promised(database.transaction("conversations").objectStore("conversations").get(id)));
}

const headOf = (c) => ({ id: c.id, title: tree.titleOf(c), updatedAt: c.updatedAt, pinned: Boolean(c.pinned), tags: tree.cleanTags(c.tags) });

// Whether they were written. The heads are there at once.
export async function saveAll(list) {
  for (const conversation of list) {
    known.set(conversation.id, headOf(conversation));
    if (!database) memory.set(conversation.id, conversation);
  }
  if (!database) return true;
  setPending(1);
  try {
    const transaction = database.transaction(["conversations", "heads"], "readwrite");
    const store = transaction.objectStore("conversations");
    let left = list.length;
    for (const conversation of list) {
      const before = store.get(conversation.id);
      before.onsuccess = () => {
        tree.merge(conversation, before.result);
        store.put(conversation);
        transaction.objectStore("heads").put(headOf(conversation));
        left -= 1;
        if (!left) transaction.commit(); // does not wait for the page, which may be about to close
      };
    }
    await ended(transaction);
    channel?.postMessage(list.map((c) => c.id));
    return true;
  } catch {
    return false; // full
  } finally {
    setPending(-1);
  }
}

export const save = (conversation) => saveAll([conversation]);

export async function remove(id) {
  known.delete(id);
  memory.delete(id);
  if (!database) return;
  setPending(1);
  try {
    const transaction = database.transaction(["conversations", "heads"], "readwrite");
    transaction.objectStore("conversations").delete(id);
    transaction.objectStore("heads").delete(id);
    transaction.commit();
    await ended(transaction);
    channel?.postMessage([id]);
  } finally {
    setPending(-1);
  }
}

function setPending(change) {
  pending += change;
  document.documentElement.toggleAttribute("data-writing", pending > 0);
}

// Calls `found(head, line)` for the conversations with a text, the newest first; titles are looked through at once.
export async function search(text, found, signal) {
  const wanted = text.toLowerCase();
  const rest = [];
  for (const head of heads()) {
    if (head.title.toLowerCase().includes(wanted)) found(head, "");
    else rest.push(head);
  }
  for (let at = 0; at < rest.length; at += SCAN) {
    const part = await Promise.all(rest.slice(at, at + SCAN).map((head) => load(head.id)));
    if (signal.aborted) return;
    for (const [index, conversation] of part.entries()) {
      const line = conversation && tree.findLine(conversation, wanted);
      if (line) found(rest[at + index], line);
    }
  }
}

// All of them, in parts, for an export.
export async function* all() {
  for (const head of heads()) {
    const conversation = await load(head.id);
    if (conversation) yield conversation;
  }
}
