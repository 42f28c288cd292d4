// The second setting: what an answer beside another one has instead of the general settings.

import { $, h, toast } from "./dom.js";
import * as store from "./store.js";
import { cleanVariant } from "./tree.js";

const NUMBERS = ["temperature", "top_p", "seed", "max_tokens"];
const TEXTS = ["model", "reasoning_effort", "system"];

let chat = null; // {models(), model()}

export function start(owner) {
  chat = owner;
}

export const variant = () => cleanVariant(store.settings().second);

// Opens the dialog; whether it was saved. `isAnswer`: an answer follows at once.
export function ask(isAnswer) {
  const { elements } = $("second-form");
  const { second, twice } = store.settings();
  elements.model.replaceChildren(h("option", { value: "" }, "as set"), ...chat.models().map(({ id }) => h("option", { value: id }, id)));
  $("second-model").hidden = chat.models().length < 2;
  for (const name of [...NUMBERS, ...TEXTS]) elements[name].value = second?.[name] ?? "";
  elements.twice.checked = twice;
  $("second-form").querySelector(".main").textContent = isAnswer ? "Answer" : "Save";
  $("second").returnValue = "";
  $("second").showModal();
  return new Promise((resolve) => {
    $("second").addEventListener("close", () => {
      const saving = $("second").returnValue === "save";
      if (saving) save();
      resolve(saving);
    }, { once: true });
  });
}

function save() {
  const { elements } = $("second-form");
  const numbers = NUMBERS.filter((name) => elements[name].value !== "").map((name) => [name, Number(elements[name].value)]);
  const value = cleanVariant({ ...Object.fromEntries(numbers), ...Object.fromEntries(TEXTS.map((name) => [name, elements[name].value])) });
  const saved = store.saveSettings({ ...store.settings(), second: value, twice: elements.twice.checked });
  if (!saved) toast("This browser does not allow storage: the settings are lost when you close the page");
}
