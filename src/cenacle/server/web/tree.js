// Conversations as data. Messages are a list in the order in which they were made; each names its `parent`, so that an
// edited question or a second answer is a branch beside the first. `leaf` is the last message of the branch that is shown.
//
//   {id, title, pinned, tags, updatedAt, system, leaf, messages: [{id, parent, role, content, at, ...}]}
//
// Optional in a message: images (data: URIs), files ({name, text}), reasoning, finish, error, stats; calls of tools ({id, name, arguments (text),
// result (text, when there is one)}); `variant`, the settings that
// this answer has instead of the general ones; `beside`, the answer next to which this one is shown until one of them is chosen.

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  return { id: newId(), title: "", tags: [], updatedAt: Date.now(), system: "", leaf: null, messages: [] };
}

const byId = (conversation) => new Map(conversation.messages.map((m) => [m.id, m]));

// The messages that are shown, or those down to `leaf`, the first one first.
export function path(conversation, leaf = conversation.leaf) {
  const known = byId(conversation);
  const found = [];
  for (let m = known.get(leaf); m && found.length <= known.size; m = known.get(m.parent)) found.unshift(m);
  return found;
}

export function add(conversation, message, parent) {
  const made = { id: newId(), parent: parent?.id ?? null, at: Date.now(), ...message };
  conversation.messages.push(made);
  conversation.leaf = made.id;
  conversation.updatedAt = made.at;
  return made;
}

// The messages in whose place this one is, itself included.
export const siblings = (conversation, message) => conversation.messages.filter((m) => m.parent === message.parent && m.role === message.role);

// Shows the branch of a message: down to its newest answer.
export function choose(conversation, message) {
  for (let m = message; m; m = conversation.messages.findLast((child) => child.parent === m.id)) conversation.leaf = m.id;
}

// The two answers between which nothing is chosen yet, if `message` is one of them: [first, second], or null.
export function pairOf(conversation, message) {
  if (message?.role !== "assistant") return null;
  const other = siblings(conversation, message).find((m) => m !== message && (m.beside === message.id || message.beside === m.id));
  if (!other) return null;
  return message.beside === other.id ? [other, message] : [message, other];
}

// Goes on with `message`, one of two that are beside each other; the other stays as a branch.
export function decide(conversation, message) {
  const second = pairOf(conversation, message)?.[1];
  if (!second) return;
  second.beside = null;
  second.changedAt = Date.now();
  choose(conversation, message);
}

// What `variant` may have.
const VARIANT_NUMBERS = ["temperature", "top_p", "seed", "max_tokens"];
const VARIANT_TEXTS = ["model", "reasoning_effort", "system"];

export function cleanVariant(value) {
  const kept = {};
  for (const name of VARIANT_NUMBERS) if (Number.isFinite(value?.[name])) kept[name] = value[name];
  for (const name of VARIANT_TEXTS) if (isText(value?.[name]) && value[name].trim()) kept[name] = value[name];
  return kept;
}

// A variant in words.
export function describeVariant({ model, temperature, top_p: topP, seed, max_tokens: limit, reasoning_effort: effort, system }) {
  const parts = [model, temperature !== undefined && `temperature ${temperature}`, topP !== undefined && `top_p ${topP}`, effort && `effort ${effort}`,
    seed !== undefined && `seed ${seed}`, limit && `at most ${limit} tokens`, system && `system: ${system.trim().slice(0, 60)}`].filter(Boolean);
  return parts.join(", ") || "the same settings";
}

// Adds what another window wrote to the messages of `conversation`; of a message that both have, the newer stays.
export function merge(conversation, other) {
  if (!Array.isArray(other?.messages)) return;
  const known = byId(conversation);
  for (const message of other.messages) {
    const own = known.get(message.id);
    if (!own) conversation.messages.push(message);
    else if ((message.changedAt ?? 0) > (own.changedAt ?? 0)) Object.assign(own, message);
  }
}

const isText = (value) => typeof value === "string";
const isPicture = (value) => isText(value) && /^data:image\/[\w.+-]+;base64,/.test(value);
const MOST_TAGS = 12; // of a conversation

// Tags from texts: without spaces around them, each once, whatever its case, in order.
export function cleanTags(texts) {
  const found = new Map();
  for (const text of Array.isArray(texts) ? texts.filter(isText) : []) {
    const tag = text.replace(/[\s,]+/g, " ").trim().slice(0, 30).trim();
    if (tag && !found.has(tag.toLowerCase())) found.set(tag.toLowerCase(), tag);
  }
  return [...found.values()].slice(0, MOST_TAGS).sort((a, b) => a.localeCompare(b));
}

const asNumber = (value) => (Number.isFinite(value) ? value : null);

// A conversation with the right types, from the storage, an older version or a file; null if it is none. Messages without
// ids follow each other.
export function clean(value) {
  if (!isText(value?.id) || !Array.isArray(value.messages)) return null;
  const messages = [];
  for (const m of value.messages) {
    if (!["user", "assistant"].includes(m?.role) || !isText(m.content)) continue;
    const last = messages.at(-1)?.id ?? null;
    const made = {
      id: isText(m.id) ? m.id : newId(), parent: isText(m.id) ? (isText(m.parent) ? m.parent : null) : last,
      role: m.role, content: m.content, at: asNumber(m.at) ?? 0,
    };
    for (const name of ["reasoning", "finish", "error", "model", "beside"]) if (isText(m[name])) made[name] = m[name];
    if (Array.isArray(m.images) && m.images.some(isPicture)) made.images = m.images.filter(isPicture);
    if (Array.isArray(m.files)) made.files = m.files.filter((f) => isText(f?.name) && isText(f.text)).map(({ name, text }) => ({ name, text }));
    if (Array.isArray(m.calls)) made.calls = cleanCalls(m.calls);
    if (m.stats && typeof m.stats === "object") made.stats = cleanStats(m.stats);
    if (m.variant && typeof m.variant === "object") made.variant = cleanVariant(m.variant);
    if (asNumber(m.changedAt)) made.changedAt = m.changedAt;
    messages.push(made);
  }
  const leaf = messages.some((m) => m.id === value.leaf) ? value.leaf : messages.at(-1)?.id ?? null;
  return {
    id: value.id, title: isText(value.title) ? value.title.slice(0, 120) : "", pinned: Boolean(value.pinned), tags: cleanTags(value.tags), updatedAt: asNumber(value.updatedAt) ?? Date.now(),
    system: isText(value.system) ? value.system : "", leaf, messages,
  };
}

const cleanCalls = (calls) => calls.filter((c) => isText(c?.name) && isText(c.arguments)).map((c) => ({
  id: isText(c.id) ? c.id : newId(), name: c.name, arguments: c.arguments, ...(isText(c.result) ? { result: c.result } : {}),
}));

const cleanStats = (s) => ({
  tokens: asNumber(s.tokens) ?? 0, exact: Boolean(s.exact), first_s: asNumber(s.first_s) ?? 0, per_s: asNumber(s.per_s),
  prompt: asNumber(s.prompt), cached: asNumber(s.cached) ?? 0,
});

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const asked = path(conversation).find((m) => m.role === "user");
  const first = (asked?.content ?? "").trim().slice(0, 400).replace(/\s+/g, " ");
  const unnamed = asked?.files?.[0]?.name ?? (asked?.images ? "Picture" : "New conversation");
  return first.length > 60 ? first.slice(0, 57) + "…" : first || unnamed;
}

// Some words around the first place with a text (in small letters), or "".
export function findLine(conversation, wanted) {
  for (const { content, reasoning = "", files = [] } of conversation.messages) {
    for (const text of [content, reasoning, ...files.flatMap((f) => [f.name, f.text])]) {
      const at = text.toLowerCase().indexOf(wanted);
      if (at >= 0) return text.slice(Math.max(0, at - 20), at + wanted.length + 50).replace(/\s+/g, " ").trim();
    }
  }
  return "";
}

// ---- files

// The shown branch. A line of its own, **You** or **Model**, begins each message.
export function toMarkdown(conversation) {
  const pictures = (m) => (m.images ?? []).map((url, i) => `![Picture ${i + 1}](${url})\n\n`).join("");
  const files = (m) => (m.files ?? []).map((f) => `${asText(f)}\n\n`).join("");
  const calls = (m) => (m.calls ?? []).map((c) => `\n\n${fenced(`Call of ${c.name}`, c.arguments, "json")}${c.result === undefined ? "" : `\n\n${fenced("Result", c.result)}`}`).join("");
  const messages = path(conversation).map((m) => `**${m.role === "user" ? "You" : "Model"}**\n\n${pictures(m)}${files(m)}${m.content}${calls(m)}`);
  const system = conversation.system ? `**System**\n\n${conversation.system}\n\n---\n\n` : "";
  const tags = conversation.tags?.length ? `Tags: ${conversation.tags.join(", ")}\n\n` : "";
  return `# ${titleOf(conversation)}\n\n${tags}${system}${messages.join("\n\n---\n\n")}\n`;
}

// A file as the model reads it: its name, and its text in a fence that it does not have.
export const asText = ({ name, text }) => fenced(`File ${name}`, text, /\.(\w{1,12})$/.exec(name)?.[1]);

function fenced(title, text, kind = "") {
  const longest = Math.max(2, ...[...text.matchAll(/`{3,}/g)].map((m) => m[0].length));
  const fence = "`".repeat(longest + 1);
  return `${title}:\n\n${fence}${kind}\n${text.replace(/\n$/, "")}\n${fence}`;
}

// The conversations in a file that this page wrote, JSON or Markdown; each gets an id of its own unless it has one.
export function fromFile(name, text) {
  if (/\.(md|markdown|txt)$/i.test(name)) return [fromMarkdown(text)].filter((c) => c.messages.length);
  const value = JSON.parse(text);
  return (Array.isArray(value) ? value : [value]).map((c) => clean({ id: newId(), ...c })).filter((c) => c?.messages.length);
}

function fromMarkdown(text) {
  const conversation = newConversation();
  conversation.title = /^# (.{1,120})/.exec(text)?.[1] ?? "";
  const parts = text.replace(/\r\n/g, "\n").split(/^\*\*(System|You|Model)\*\*$/m);
  conversation.tags = cleanTags(/^Tags: (.+)$/m.exec(parts[0])?.[1].split(","));
  let last = null;
  for (let i = 1; i < parts.length; i += 2) {
    const content = parts[i + 1].replace(/\n\n---\s*$/, "").trim();
    if (parts[i] === "System") conversation.system = content;
    else last = add(conversation, { role: parts[i] === "You" ? "user" : "assistant", content }, last);
  }
  return conversation;
}
