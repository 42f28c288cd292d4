// The list of conversations: search, and what can be done with one. Only those near the visible ones have elements.

import { $, canShare, download, h, icon, share, toast } from "./dom.js";
import * as store from "./store.js";
import * as tree from "./tree.js";

const PAGE = 100; // rows that are made at a time

let chat = null; // {shown(), isAnswering(id), pick(id), live(id), removed(id), stop(id)}
let rows = PAGE;
let found = null; // [[head, line]] of a search
let chosenTag = null; // only conversations that have it are shown
let searching = new AbortController();

export function start(owner) {
  chat = owner;
  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 120);
  });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && $("search").value) {
      event.stopPropagation();
      $("search").value = "";
      search();
    } else if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      const first = $("conversations").querySelector(".pick");
      if (event.key === "Enter") first?.click();
      else first?.focus();
    }
  });
  $("conversations").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.matches(".pick")) return;
    event.preventDefault();
    const all = [...$("conversations").querySelectorAll(".pick")];
    (all[all.indexOf(event.target) + step] ?? (step < 0 ? $("search") : event.target)).focus();
  });
  $("conversations").addEventListener("scroll", () => {
    const box = $("conversations");
    if (box.scrollTop + box.clientHeight < box.scrollHeight - 400) return;
    if (rows < listed().length) {
      rows += PAGE;
      show();
    }
  }, { passive: true });
  $("export-all").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const files = [...$("import-file").files];
    $("import-file").value = "";
    await importFiles(files);
  });
}

async function search() {
  searching.abort();
  searching = new AbortController();
  const text = $("search").value.trim();
  rows = PAGE;
  found = text ? [] : null;
  if (text) {
    let planned = false;
    const { signal } = searching;
    await store.search(text, (head, line) => {
      found.push([head, line]);
      if (planned) return;
      planned = true;
      setTimeout(() => { planned = false; if (!signal.aborted) show(); });
    }, signal);
    if (signal.aborted) return;
    $("search-result").textContent = `${found.length} found`;
  } else {
    $("search-result").textContent = "";
  }
  show();
}

// A new conversation gets the tag that is shown, as in a folder.
export const newTags = () => (chosenTag === null ? [] : [chosenTag]);

// [[head, line]], by search and tag.
function listed() {
  const list = found?.filter(([head]) => store.exists(head.id)) ?? store.heads().map((head) => [head, ""]);
  return chosenTag === null ? list : list.filter(([head]) => head.tags?.includes(chosenTag));
}

const SHOWN_TAGS = 30;

function showTags() {
  const known = store.tags();
  if (!known.some(([tag]) => tag === chosenTag)) chosenTag = null;
  const box = $("tags");
  const signature = JSON.stringify([known, chosenTag]);
  if (box.dataset.signature === signature) return;
  box.dataset.signature = signature;
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.tag : null;
  const most = new Set([...known].sort((a, b) => b[1] - a[1]).slice(0, SHOWN_TAGS).map(([tag]) => tag));
  box.hidden = !known.length;
  box.replaceChildren(...known.filter(([tag]) => most.has(tag) || tag === chosenTag).map(([tag, count]) => h("button", {
    type: "button", "data-tag": tag, "aria-pressed": String(tag === chosenTag), dir: "auto",
    onclick: () => { chosenTag = tag === chosenTag ? null : tag; rows = PAGE; show(); },
  }, tag, h("small", {}, String(count)))));
  if (focused !== null) [...box.children].find((e) => e.dataset.tag === focused)?.focus();
}

export function show() {
  showTags();
  const list = listed();
  const none = found || chosenTag !== null ? "Nothing found" : "No conversations yet";
  const box = $("conversations");
  const focused = box.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
  if (box.querySelector(".menu:popover-open, .rename")) return; // in use: the next change shows it
  box.replaceChildren(...list.slice(0, rows).map(([head, line]) => row(head, line)));
  if (!list.length) box.append(h("li", { class: "none" }, none));
  if (focused) [...box.children].find((e) => e.dataset.id === focused)?.querySelector(".pick").focus();
}

function row(head, line) {
  const current = head.id === chat.shown().id;
  const options = h("button", { class: "icon", type: "button", "aria-haspopup": "menu", "aria-label": `Options for ${head.title}` }, icon("more"));
  const item = h("li", { class: current ? "current" : null, "data-id": head.id },
    h("button", { class: "pick", type: "button", "aria-current": current ? "true" : null, onclick: () => chat.pick(head.id) },
      chat.isAnswering(head.id) && h("span", { class: "pulse", role: "img", "aria-label": "answering" }),
      head.pinned && h("span", { class: "pin", role: "img", "aria-label": "pinned" }, icon("pin")),
      h("span", { class: "title", dir: "auto" }, head.title, line && h("small", {}, line),
        head.tags?.length > 0 && h("small", { class: "row-tags" }, head.tags.map((tag) => h("span", {}, tag))))),
    options);
  options.addEventListener("click", () => openMenu(head, item, options));
  return item;
}

function openMenu(head, item, button) {
  const menu = h("div", { class: "menu", popover: "auto", role: "menu" });
  const entry = (label, action, className = null) => menu.append(h("button", {
    type: "button", role: "menuitem", class: className, onclick: () => { menu.hidePopover(); action(); },
  }, label));
  entry("Rename", () => rename(head, item));
  entry("Tags", () => editTags(head, item));
  entry(head.pinned ? "Unpin" : "Pin", () => change(head.id, (c) => { c.pinned = !c.pinned; }));
  if (canShare()) entry("Share", () => shareOne(head));
  entry("Export as Markdown", () => exportOne(head, "md", tree.toMarkdown, "text/markdown"));
  entry("Export as JSON", () => exportOne(head, "json", (c) => JSON.stringify(c, null, 1), "application/json"));
  entry("Delete", () => remove(head), "danger");
  item.append(menu);
  menu.addEventListener("toggle", (event) => {
    if (event.newState === "closed") {
      menu.remove();
      return;
    }
    const box = button.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(box.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 8))}px`;
    menu.style.top = `${box.bottom + 4 + menu.offsetHeight > innerHeight ? box.top - menu.offsetHeight - 4 : box.bottom + 4}px`;
    menu.firstChild.focus();
  });
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") {
      menu.hidePopover();
      button.focus();
    }
    if (!step) return;
    event.preventDefault();
    const all = [...menu.children];
    all.at((all.indexOf(document.activeElement) + step) % all.length).focus();
  });
  menu.showPopover();
}

async function change(id, edit) {
  const conversation = await chat.live(id);
  if (!conversation) return;
  edit(conversation);
  if (!(await store.save(conversation))) toast("The browser's storage is full: export or delete conversations");
  show();
}

async function exportOne(head, ending, make, type) {
  const conversation = await chat.live(head.id);
  const name = head.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";
  if (conversation) download(`${name}.${ending}`, [make(conversation)], type);
}

async function shareOne(head) {
  const conversation = await chat.live(head.id);
  if (conversation) share(head.title, tree.toMarkdown(conversation));
}

function rename(head, item) {
  editInPlace(item, "New name", head.title, { maxlength: 120 }, (title) => title && change(head.id, (c) => { c.title = title; }));
}

function editTags(head, item) {
  const attributes = { placeholder: "work, ideas" };
  editInPlace(item, "Tags, with commas between them", (head.tags ?? []).join(", "), attributes, (text) => change(head.id, (c) => { c.tags = tree.cleanTags(text.split(",")); }));
}

// A field in the place of a row. `save(text)` returns false if there is nothing to save.
function editInPlace(item, label, value, attributes, save) {
  const field = h("input", { class: "rename", "aria-label": label, maxlength: 400, dir: "auto", autocomplete: "off", ...attributes });
  field.value = value;
  const finish = (saving) => {
    field.onblur = null;
    field.remove();
    if (!(saving && save(field.value.trim()))) show();
  };
  field.onblur = () => finish(true);
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  item.replaceChildren(field);
  field.focus();
  field.select();
}

async function remove(head) {
  const conversation = await chat.live(head.id);
  chat.stop(head.id);
  await store.remove(head.id);
  chat.removed(head.id);
  show();
  if (conversation) toast("Conversation deleted", "Undo", async () => { await store.save(conversation); chat.pick(conversation.id); });
}

async function exportAll() {
  const parts = [];
  for await (const conversation of store.all()) parts.push(parts.length ? ",\n" : "[", JSON.stringify(conversation, null, 1));
  if (!parts.length) return toast("There are no conversations to export");
  download("cenacle-conversations.json", [...parts, "]"], "application/json");
}

export async function importFiles(files) {
  let count = 0;
  for (const file of files) {
    try {
      const read = tree.fromFile(file.name, await file.text());
      if (read.length && !(await store.saveAll(read))) return toast("The browser's storage is full: export or delete conversations");
      count += read.length;
    } catch {
      toast(`${file.name} is not an export of this page`);
      return;
    }
  }
  toast(count ? `${count} conversation${count === 1 ? "" : "s"} imported` : "There are no conversations in this file");
  show();
}
