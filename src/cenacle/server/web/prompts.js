// The system prompt of a conversation, and templates: texts that are kept to be used again.

import { $, h, iconButton, toast } from "./dom.js";
import * as store from "./store.js";

let chat = null; // {conversation(), save(), insert(text)}

export function start(owner) {
  chat = owner;
  $("open-prompts").addEventListener("click", show);
  $("add-template").addEventListener("click", add);
  $("prompts-form").elements.name.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else the dialog would close
    add();
  });
  $("prompts").addEventListener("close", () => {
    if ($("prompts").returnValue !== "save") return;
    const system = $("prompts-form").elements.system.value;
    if (system === chat.conversation().system) return;
    chat.conversation().system = system;
    chat.save();
  });
}

export function show() {
  const { system } = $("prompts-form").elements;
  system.value = chat.conversation().system;
  system.placeholder = store.settings().system.trim() || "How the model should answer here";
  list();
  $("prompts").returnValue = "";
  $("prompts").showModal();
}

function add() {
  const { name, text } = $("prompts-form").elements;
  if (!name.value.trim() || !text.value.trim()) return toast("A template needs a name and a text");
  const others = store.templates().filter((t) => t.name !== name.value.trim());
  if (!store.saveTemplates([...others, { name: name.value.trim(), text: text.value }])) return toast("The browser's storage is full");
  name.value = text.value = "";
  list();
}

function list() {
  const all = store.templates();
  $("templates").replaceChildren(...all.map((template) => h("li", {},
    h("button", { class: "insert", type: "button", title: template.text, onclick: () => { $("prompts").close(""); chat.insert(template.text); } },
      h("strong", { dir: "auto" }, template.name), h("span", { dir: "auto" }, template.text.slice(0, 120))),
    h("button", {
      class: "link", type: "button", "aria-label": `Use ${template.name} as system prompt`,
      onclick: () => { $("prompts-form").elements.system.value = template.text; },
    }, "as system"),
    iconButton("close", `Delete ${template.name}`, () => { store.saveTemplates(store.templates().filter((t) => t.name !== template.name)); list(); }))));
  if (!all.length) $("templates").append(h("li", { class: "none" }, "None yet. Keep texts here that you ask again and again."));
}
