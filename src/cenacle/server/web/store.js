// What the browser stores: settings, the API key, conversations. Each conversation is an entry of
// its own, so that two windows do not overwrite each other's.

const PREFIX = "cenacle.";
const DEFAULTS = { system: "", temperature: null, max_tokens: null, seed: null, theme: "auto", wrap: false };

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

export const ENTRY_PREFIX = `${PREFIX}conversation.`;
const entryName = (id) => `conversation.${id}`;

export function newConversation() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
  return { id, title: "", updatedAt: Date.now(), messages: [] };
}

// Newest first. Damaged entries are skipped.
export function conversations() {
  const all = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(ENTRY_PREFIX)) continue;
    const conversation = read(name.slice(PREFIX.length), null);
    if (conversation && typeof conversation.id === "string" && Array.isArray(conversation.messages)) all.push(conversation);
  }
  return all.sort((a, b) => b.updatedAt - a.updatedAt);
}

export const findConversation = (id) => conversations().find((c) => c.id === id);
export const save = (conversation) => write(entryName(conversation.id), conversation);
export const remove = (id) => localStorage.removeItem(PREFIX + entryName(id));

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((m) => m.role === "user")?.content.trim().replace(/\s+/g, " ") ?? "";
  const unnamed = conversation.messages.some((m) => m.images?.length) ? "Picture" : "New conversation";
  return first.length > 60 ? first.slice(0, 57) + "…" : first || unnamed;
}

export function toMarkdown(conversation) {
  const pictures = (m) => (m.images ?? []).map((url, i) => `![Picture ${i + 1}](${url})\n\n`).join("");
  const messages = conversation.messages.map((m) => `**${m.role === "user" ? "You" : "Model"}**\n\n${pictures(m)}${m.content}`);
  return `# ${titleOf(conversation)}\n\n${messages.join("\n\n---\n\n")}\n`;
}
