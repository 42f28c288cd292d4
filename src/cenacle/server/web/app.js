// The page: which view is shown, settings, the API key, and whether the server works.

import * as api from "./api.js";
import * as chat from "./chat.js";
import * as cluster from "./cluster.js";
import { $, setIcon, toast } from "./dom.js";
import { setSees } from "./pictures.js";
import * as store from "./store.js";

for (const button of document.querySelectorAll("[data-icon]")) setIcon(button, button.dataset.icon, button.getAttribute("aria-label"));

// ---- views

function showView() {
  const current = location.hash === "#cluster" ? "cluster" : "chat";
  for (const view of ["chat", "cluster"]) {
    $(`view-${view}`).hidden = view !== current;
    if (view === current) $(`tab-${view}`).setAttribute("aria-current", "page");
    else $(`tab-${view}`).removeAttribute("aria-current");
  }
  document.body.dataset.view = current;
  cluster.setVisible(current === "cluster");
}
addEventListener("hashchange", showView);

// ---- settings and API key

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
  const settings = { ...store.settings(), key: store.key() };
  for (const [name, value] of Object.entries(settings)) if (form.elements[name]) form.elements[name].value = value ?? "";
  $("settings").returnValue = "";
  $("settings").showModal();
});
$("settings").addEventListener("close", () => {
  if ($("settings").returnValue !== "save") return;
  const number = (name) => (form.elements[name].value === "" ? null : Number(form.elements[name].value));
  const saved = store.saveSettings({
    system: form.elements.system.value,
    temperature: number("temperature"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    theme: form.elements.theme.value,
  }) && store.saveKey(form.elements.key.value.trim());
  toast(saved ? "Saved" : "This browser does not allow storage: the settings are lost when you close the page");
  applyTheme();
});

api.onKeyNeeded((wasRejected) => new Promise((resolve) => {
  const dialog = $("key");
  const field = $("key-form").elements.key;
  field.value = "";
  $("key-title").textContent = wasRejected ? "The API key was not accepted" : "API key required";
  dialog.returnValue = "";
  dialog.addEventListener("close", () => {
    const key = dialog.returnValue === "save" ? field.value.trim() : "";
    if (key) store.saveKey(key);
    resolve(key !== "");
  }, { once: true });
  dialog.showModal();
}));

// ---- the server's state

function showModelName(name) {
  $("model").textContent = $("model").title = name;
  chat.setModel(name);
}

cluster.onState((state) => {
  if (state?.model) showModelName(state.model);
  const problem = cluster.describeProblem(state);
  $("status-dot").className = `dot ${problem ? "bad" : "good"}`;
  $("tab-cluster").title = problem ?? "All nodes are running";
  if ($("banner").textContent !== (problem ?? "")) $("banner").textContent = problem ?? "";
  $("banner").hidden = !problem;
});

applyTheme();
showView();
try {
  const { data } = await api.getJson("/v1/models");
  showModelName(data[0].id);
  setSees(data[0].architecture?.input_modalities?.includes("image") ?? false);
} catch { /* the banner says what is wrong */ }
chat.start();
cluster.start();
