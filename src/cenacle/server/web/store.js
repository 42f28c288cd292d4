// What is kept in the browser: settings, the key, conversations. One entry per conversation, so
// that two windows do not write over each other's.

const PREFIX = "cenacle.";
const DEFAULTS = { system: "", temperature: null, max_tokens: null, seed: null, theme: "auto" };

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise; // not ours, or the browser keeps nothing
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

export function newConversation() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
  return { id, title: "", at: Date.now(), messages: [] };
}

// The newest first. A damaged entry is passed over.
export function conversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(PREFIX + "talk.")) continue;
    const talk = read(name.slice(PREFIX.length), null);
    if (talk && typeof talk.id === "string" && Array.isArray(talk.messages)) found.push(talk);
  }
  return found.sort((a, b) => b.at - a.at);
}

export const save = (talk) => write("talk." + talk.id, talk);
export const remove = (id) => localStorage.removeItem(PREFIX + "talk." + id);

export function titleOf(talk) {
  if (talk.title) return talk.title;
  const first = talk.messages.find((m) => m.role === "user")?.content.trim().replace(/\s+/g, " ") ?? "";
  return first.length > 60 ? first.slice(0, 57) + "…" : first || "New conversation";
}

export function asMarkdown(talk) {
  const parts = talk.messages.map((m) => `**${m.role === "user" ? "You" : "Model"}**\n\n${m.content}`);
  return `# ${titleOf(talk)}\n\n${parts.join("\n\n---\n\n")}\n`;
}
