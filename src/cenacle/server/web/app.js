// The page: which view is shown, settings, the key, and whether the server is well.

import * as api from "./api.js";
import * as chat from "./chat.js";
import * as cluster from "./cluster.js";
import { $, setIcon, toast } from "./dom.js";
import * as store from "./store.js";

for (const button of document.querySelectorAll("[data-icon]")) setIcon(button, button.dataset.icon, button.getAttribute("aria-label"));

// ---- views

function show() {
  const name = location.hash === "#cluster" ? "cluster" : "chat";
  for (const each of ["chat", "cluster"]) {
    $(`view-${each}`).hidden = each !== name;
    if (each === name) $(`tab-${each}`).setAttribute("aria-current", "page");
    else $(`tab-${each}`).removeAttribute("aria-current");
  }
  document.body.dataset.view = name;
  cluster.shown(name === "cluster");
}
addEventListener("hashchange", show);

// ---- settings and key

function applyTheme() {
  const { theme } = store.settings();
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  cluster.repaint();
}

for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close(""));
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(""); });
}

const form = $("settings-form");
$("open-settings").addEventListener("click", () => {
  const now = { ...store.settings(), key: store.key() };
  for (const [name, value] of Object.entries(now)) if (form.elements[name]) form.elements[name].value = value ?? "";
  $("settings").returnValue = "";
  $("settings").showModal();
});
$("settings").addEventListener("close", () => {
  if ($("settings").returnValue !== "save") return;
  const number = (name) => (form.elements[name].value === "" ? null : Number(form.elements[name].value));
  const kept = store.saveSettings({
    system: form.elements.system.value,
    temperature: number("temperature"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    theme: form.elements.theme.value,
  }) && store.saveKey(form.elements.key.value.trim());
  toast(kept ? "Saved" : "This browser keeps nothing: the settings are lost when you leave");
  applyTheme();
});

api.onKeyNeeded((refused) => new Promise((resolve) => {
  const dialog = $("key");
  const field = $("key-form").elements.key;
  field.value = "";
  $("key-title").textContent = refused ? "The key was not accepted" : "This server asks for a key";
  dialog.returnValue = "";
  dialog.addEventListener("close", () => {
    const given = dialog.returnValue === "save" ? field.value.trim() : "";
    if (given) store.saveKey(given);
    resolve(given !== "");
  }, { once: true });
  dialog.showModal();
}));

// ---- the server's state

cluster.onState((state) => {
  const name = state?.model ?? "";
  if (name) {
    $("model").textContent = $("model").title = name;
    chat.setModel(name);
  }
  const problem = cluster.problemOf(state);
  $("dot").className = `dot ${problem ? "bad" : "good"}`;
  $("tab-cluster").title = problem ?? "All nodes answer";
  if ($("banner").textContent !== (problem ?? "")) $("banner").textContent = problem ?? "";
  $("banner").hidden = !problem;
});

applyTheme();
show();
try {
  const { data } = await api.json("/v1/models");
  chat.setModel(data[0].id);
  $("model").textContent = $("model").title = data[0].id;
} catch { /* the banner says what is wrong */ }
chat.start();
cluster.start();
