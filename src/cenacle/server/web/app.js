// The page: which view is shown, settings, the API key, and whether the server works.

import * as api from "./api.js";
import * as chat from "./chat.js";
import * as cluster from "./cluster.js";
import { $, h, setIcon, toast } from "./dom.js";
import * as store from "./store.js";
import * as tools from "./tools.js";

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
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "thinking_budget"];
const TEXTS = ["system", "stop", "reasoning_effort", "schema", "tools", "theme"];
$("open-settings").addEventListener("click", () => {
  const settings = { ...store.settings(), key: store.key() };
  for (const [name, value] of Object.entries(settings)) if (form.elements[name]) form.elements[name].value = value ?? "";
  form.querySelector("details").open = ["top_p", "top_k", "min_p", "seed", "thinking_budget"].some((name) => settings[name] !== null) || Boolean(settings.stop || settings.schema);
  $("tool-bench").open = settings.tools.trim() !== "";
  checkSchema();
  checkTools();
  $("settings").returnValue = "";
  $("settings").showModal();
});
// The form is not sent while the schema is no JSON object.
function checkSchema() {
  const field = form.elements.schema;
  let problem = "";
  try {
    const schema = field.value.trim() ? JSON.parse(field.value) : {};
    if (schema === null || typeof schema !== "object" || Array.isArray(schema)) problem = "A schema is a JSON object.";
  } catch (error) {
    problem = `This is not JSON: ${error.message}`;
  }
  field.setCustomValidity(problem);
}
function checkTools() {
  let problem = "";
  try {
    tools.parse(form.elements.tools.value);
  } catch (error) {
    problem = error.message;
  }
  form.elements.tools.setCustomValidity(problem);
}
form.elements.tools.addEventListener("input", checkTools);
form.elements.tools.addEventListener("invalid", () => { $("tool-bench").open = true; });
$("example-tools").addEventListener("click", () => {
  form.elements.tools.setRangeText(tools.EXAMPLE, 0, form.elements.tools.value.length, "start");
  checkTools();
  form.elements.tools.focus();
});
form.elements.schema.addEventListener("input", checkSchema);
form.elements.schema.addEventListener("invalid", () => { form.querySelector("details").open = true; });
$("settings").addEventListener("close", () => {
  if ($("settings").returnValue !== "save") return;
  const number = (name) => (form.elements[name].value === "" ? null : Number(form.elements[name].value));
  const saved = store.saveSettings({
    ...store.settings(),
    ...Object.fromEntries(NUMBERS.map((name) => [name, number(name)])),
    ...Object.fromEntries(TEXTS.map((name) => [name, form.elements[name].value])),
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

let servedModel = ""; // by the last state
let wasConnected = true;

async function readModels() {
  try {
    const { data } = await api.getJson("/v1/models");
    const choice = $("choose-model");
    choice.replaceChildren(...data.map(({ id }) => h("option", { value: id }, id)));
    chat.setModels(data);
    showModel();
  } catch { /* the banner says what is wrong */ }
}

function showModel() {
  const chosen = chat.model()?.id ?? servedModel;
  const choice = $("choose-model");
  choice.value = chosen;
  choice.hidden = choice.options.length < 2;
  $("model").hidden = !choice.hidden;
  $("model").textContent = $("model").title = chosen;
}

$("choose-model").addEventListener("change", () => {
  store.saveSettings({ ...store.settings(), model: $("choose-model").value });
  chat.setModels(chat.allModels());
  showModel();
});

cluster.onState((state, connected) => {
  if (connected && (!wasConnected || (state?.model && state.model !== servedModel))) {
    if (!wasConnected) toast("Connected again");
    if (servedModel) readModels(); // it may be another one
  }
  servedModel = state?.model ?? servedModel;
  wasConnected = connected;
  if (connected && ["ok", "idle"].includes(state?.status)) chat.onConnected();
  const problem = cluster.describeProblem(state);
  $("status-dot").className = `dot ${problem ? "bad" : "good"}`;
  $("tab-cluster").title = problem ?? "All nodes are running";
  if ($("banner").textContent !== (problem ?? "")) $("banner").textContent = problem ?? "";
  $("banner").hidden = !problem;
});

applyTheme();
showView();
await readModels();
await chat.start();
cluster.start();
