// The cluster view: polls GET /cluster and shows nodes, experts, step timings, the last minutes or hours, and faults.

import * as api from "./api.js";
import { colors, describeAgo, formatBytes, formatNumber, HeatMap, stackedBar, TimeChart } from "./charts.js";
import { $, copyText, h, iconButton } from "./dom.js";

const VISIBLE_POLL_MS = 1000;
const HIDDEN_POLL_MS = 5000; // for the dot in the header
const RECENT_MS = 60_000;

let state = null;
let pollError = null; // why the last poll failed
let visible = false;
let timer = 0;
let placement = null;
let routing = null; // {steps, counts} since the group started
let snapshots = []; // [{at, routing}] of the last minute
let period = "all"; // or "recent"
let timeline = null; // the last day by the minute, and faults
let span = "minutes"; // or "hours"
let listener = () => {};
let view = null;

export function onState(callback) {
  listener = callback;
}

export function start() {
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  addEventListener("connectionlost", () => setTimeout(poll, VISIBLE_POLL_MS)); // it may be back at once
  poll();
}

export function setVisible(value) {
  visible = value;
  if (visible && timer) poll();
}

export function repaint() {
  if (view) draw();
}

export function describeProblem(current) {
  if (pollError) return pollError;
  if (current?.status === "failed") return `The cluster has failed: ${current.reason}`;
  if (current?.status === "recovering") {
    const event = current.rank == null ? "The nodes are restarting." : "A node was lost and is restarting.";
    return `${event} Answers continue afterwards. (${current.reason})${current.detail ? ` Now: ${current.detail}` : ""}`;
  }
  return null;
}

async function poll() {
  clearTimeout(timer);
  timer = -1;
  try {
    const known = new URLSearchParams({ placement: placement?.id ?? "", steps: routing?.steps ?? "", timeline: timeline?.version ?? "" });
    const latest = await api.getJson(`/cluster?${known}`, false);
    if (state && latest.model !== state.model) { // another of several models
      placement = routing = timeline = null;
      snapshots = [];
      if (state.model && latest.model) { // what was left out is the last model's
        state = null;
        return poll();
      }
    }
    state = latest;
    pollError = null;
    placement = state.placement ?? placement;
    timeline = state.timeline ?? timeline;
    if (state.routing) addSnapshot(state.routing);
  } catch (error) {
    pollError = error.status === 401 ? "This server requires an API key. Enter it in the settings." : error.message;
  }
  listener(state, pollError === null);
  if (visible && !document.hidden) draw();
  clearTimeout(timer);
  timer = document.hidden ? 0 : setTimeout(poll, visible || pollError ? VISIBLE_POLL_MS : HIDDEN_POLL_MS);
}

function addSnapshot(latest) {
  if (routing && latest.steps < routing.steps) snapshots = []; // the group counts from zero again
  routing = latest;
  const now = Date.now();
  snapshots.push({ at: now, routing });
  while (snapshots.length > 1 && now - snapshots[1].at > RECENT_MS) snapshots.shift();
}

function routingCounts() {
  if (period === "all" || snapshots.length < 2) return routing?.counts ?? [];
  const before = snapshots[0].routing.counts;
  return routing.counts.map((row, layer) => row.map((n, expert) => n - before[layer][expert]));
}

// ---- drawing

// Components of a step: name in the JSON, label, explanation.
const COMPONENTS = [
  ["trunk", "Trunk", "attention, router, dense layers"],
  ["experts", "Experts", "the chosen experts"],
  ["all_reduce", "All-reduce", "sums over the nodes"],
  ["waiting", "Waiting", "for the slowest node"],
  ["rest", "Rest", "output head, sampling, overhead"],
];

function build() {
  const card = (name, title, ...content) => h("section", { class: `card ${name}`, "aria-label": title },
    h("h2", {}, title), ...content);
  view = {
    lead: h("div", { class: "lead" }),
    figures: h("div", { class: "figures" }),
    nodes: h("div", { class: "nodes" }),
    legend: h("div", { class: "legend", role: "group", "aria-label": "Highlight the experts of one node" }),
    heatMap: new HeatMap(),
    heatNote: h("p", { class: "hint" }),
    period: h("div", { class: "choice", role: "group", "aria-label": "Period" },
      ...[["all", "Since the start"], ["recent", "Last minute"]].map(([name, label]) =>
        h("button", { type: "button", "data-period": name, onclick: () => { period = name; draw(); } }, label))),
    timings: h("div", { class: "timings" }),
    span: h("div", { class: "choice", role: "group", "aria-label": "Span of time" },
      ...[["minutes", "5 minutes"], ["hours", "Hours"]].map(([name, label]) =>
        h("button", { type: "button", "data-span": name, onclick: () => { span = name; draw(); } }, label))),
    tokens: new TimeChart("Tokens per second"),
    requests: new TimeChart("Requests"),
    sent: new TimeChart("Sent between nodes", formatBytes),
    disk: new TimeChart("Free disk space", formatBytes),
    table: h("details", { class: "more" }, h("summary", {}, "As a table"), h("div", { class: "wide", tabindex: "0" })),
    faults: h("div", { class: "faults" }),
    usage: h("div", { class: "wide", tabindex: "0" }),
  };
  view.table.addEventListener("toggle", drawHistory);
  $("cluster").replaceChildren(
    view.lead, view.figures,
    card("card-nodes", "Nodes", view.nodes, addMachine()),
    card("card-experts", "Experts", view.period, view.legend, view.heatMap.element, view.heatNote),
    h("div", { class: "stack" },
      card("card-timings", "Time per token", view.timings),
      card("card-usage", "API keys", view.usage),
      card("card-faults", "Faults", view.faults)),
    card("card-history", "Load", view.span, view.tokens.element, view.requests.element, view.sent.element, view.disk.element, view.table));
}

function draw() {
  if (!state) {
    view = null;
    $("cluster").replaceChildren(h("div", { class: "empty" },
      pollError ? [h("h1", {}, "No data yet"), h("p", {}, pollError)] : h("p", { class: "loading" }, "Loading…")));
    return;
  }
  if (state.status === "idle") { // several models, none of which is loaded
    view = null;
    $("cluster").replaceChildren(h("div", { class: "empty" }, h("h1", {}, "No model is loaded"),
      h("p", {}, "The first question to one of these loads it."),
      h("ul", {}, Object.entries(state.models).map(([name, what]) => h("li", {}, `${name}: ${what}`)))));
    return;
  }
  if (!view) build();
  $("cluster").classList.toggle("stale", Boolean(pollError));
  drawLead();
  drawFigures();
  drawNodes();
  drawExperts();
  drawTimings();
  drawHistory();
  drawUsage();
  drawFaults();
}

const meanOf = (steps) => (steps === 1 ? "one measured step" : `mean of ${steps} measured steps`);

function drawLead() {
  const { plan, nodes } = state;
  const placementText = {
    whole: "each expert on one node",
    sliced: "a slice of every expert on every node",
    replicated: "experts on several nodes",
  }[plan.placement] ?? plan.placement;
  view.lead.replaceChildren(
    h("h1", {}, state.model),
    h("p", {}, [`${state.family}, ${formatBytes(plan.total_bytes)}`, nodes === 1 ? "one node" : `${nodes} nodes: ${placementText}`,
      nodes > 1 && `${plan.all_reduces} all-reduces per token over ${plan.backend}`, `up for ${formatDuration(state.uptime_s)}`,
      state.recoveries && `recovered ${state.recoveries === 1 ? "once" : `${state.recoveries} times`}`].filter(Boolean).join(" · ")));
}

function drawFigures() {
  const { totals, step_timings: { steps, mean_ms: mean, rank_ms: ranks }, history, drafts } = state;
  const rate = history.tokens_per_s.at(-1) ?? 0;
  const busiest = Math.max(0, ...ranks.map((rank) => rank.experts));
  const figures = [
    ["Tokens per second", rate ? formatNumber(rate) : "0", "all requests together"],
    ["Running requests", state.running, state.waiting ? `${state.waiting} waiting` : "none waiting"],
    ["Time per token", steps ? `${formatNumber(mean.total)} ms` : "–", steps ? meanOf(steps) : "not measured yet"],
    ["Busiest node", state.nodes > 1 && mean.experts ? `${(busiest / mean.experts).toFixed(2)}×` : "–", "expert time over the mean"],
    ["Generated tokens", formatNumber(totals.generated_tokens), `${formatNumber(totals.prompt_tokens)} prompt, ${formatNumber(totals.requests)} request${totals.requests === 1 ? "" : "s"}`],
    ...(totals.prompt_tokens ? [["Prefix cache", `${Math.round((100 * totals.cached_tokens) / totals.prompt_tokens)} %`, "of the prompt tokens"]] : []),
    ...(drafts?.drafted ? [["Accepted drafts", `${Math.round((100 * drafts.accepted) / drafts.drafted)} %`, `of ${formatNumber(drafts.drafted)} drafted tokens`]] : []),
  ];
  view.figures.replaceChildren(...figures.map(([title, value, note]) =>
    h("div", { class: "figure" }, h("span", { class: "title" }, title), h("strong", {}, value), h("span", { class: "note" }, note))));
}

function nodeStatus(rank, isLost) {
  if (isLost) return ["lost", "bad"];
  if (state.status === "failed") return ["stopped", "bad"];
  if (state.status !== "ok") return ["starting", "late"];
  if (pollError) return ["unknown", "late"];
  if (rank.silent_s > 3) return [`silent for ${Math.round(rank.silent_s)} s`, "late"];
  return ["running", "good"];
}

function drawNodes() {
  view.nodes.replaceChildren(...state.ranks.map((rank, index) => {
    const isLost = state.status !== "ok" && state.rank === index;
    const [status, statusClass] = nodeStatus(rank, isLost);
    const meter = h("div", { class: "meter" });
    const resident = rank.memory?.resident_bytes;
    const total = rank.memory?.total_bytes;
    if (total) {
      const used = h("span", { class: `used node-${index % 8}` });
      used.style.width = `${Math.min(100, (100 * (resident ?? rank.weights_bytes)) / total)}%`;
      meter.append(used);
    }
    const timings = state.step_timings.rank_ms[index];
    return h("div", { class: `node${isLost ? " lost" : ""}` },
      h("div", { class: "name" }, h("span", { class: `swatch node-${index % 8}` }), h("strong", {}, `Node ${index}`),
        h("span", { class: `state ${statusClass}` }, status)),
      meter,
      h("dl", {},
        h("dt", {}, "Weights"), h("dd", {}, formatBytes(rank.weights_bytes)),
        h("dt", {}, "Memory"), h("dd", {}, resident === undefined ? "–" : formatBytes(resident), total && h("small", {}, ` of ${formatBytes(total)}`)),
        ...describeDevices(rank),
        timings && h("dt", {}, "Experts"), timings && h("dd", {}, `${formatNumber(timings.experts)} ms`),
        timings && h("dt", {}, "Waiting"), timings && h("dd", {}, `${formatNumber(timings.waiting)} ms`)),
      h("p", { class: "device", title: rank.device }, `${rank.device.replace(/^Device\((\w+), \d+\)/, "$1")} · process ${rank.pid}`));
  }));
}

// Pairs of a name and a value: the disk with the model, and the way to the other nodes.
function describeDevices({ disk, link }) {
  const pair = (name, title, value) => [h("dt", { title }, name), h("dd", { title }, value)];
  const measured = "of the slowest link to another node, measured when the group was formed";
  return [
    ...(disk ? pair("Disk free", `where the model is, of ${formatBytes(disk.total_bytes)}`, formatBytes(disk.free_bytes)) : []),
    ...(link ? pair("Sent", "into all-reduces, since the ranks were started", formatBytes(link.sent_bytes)) : []),
    ...(link && link.latency_s !== null ? pair("Link", `latency ${measured}`, `${formatNumber(1000 * link.latency_s)} ms`) : []),
    ...(link && link.latency_s !== null ? pair("Rate", `bandwidth ${measured}`, `${formatBytes(link.bytes_per_s)}/s`) : []),
  ];
}

let highlighted = null; // a rank, or "shared"
function drawExperts() {
  if (!placement) return;
  const sets = placement.rank_sets;
  const isShared = (set) => set.length > 1;
  const names = sets.map((set) => (!isShared(set) ? `Node ${set[0]}` : set.length === state.nodes ? "every node" : `Nodes ${set.join(", ")}`));
  const single = Array.from({ length: state.nodes }, (_, r) => r).filter((r) => sets.some((set) => !isShared(set) && set[0] === r));
  const sharedLabel = sets.every((set) => set.length === state.nodes) ? "A slice on every node" : "On several nodes";
  const buttons = [
    ...single.map((r) => [r, `Node ${r}`, `node-${r % 8}`]),
    ...(sets.some(isShared) ? [["shared", sharedLabel, "node-all"]] : []),
  ];
  drawLegend(buttons);
  for (const button of view.period.children) button.setAttribute("aria-pressed", String(button.dataset.period === period));
  const counts = routingCounts();
  const palette = colors(view.legend, buttons.map(([, , color]) => color));
  view.heatMap.show({
    placement, counts, names, palette,
    colorOf: (set) => palette[buttons.findIndex(([target]) => (isShared(set) ? target === "shared" : target === set[0]))],
    isHighlighted: (set) => highlighted === null || (highlighted === "shared" ? isShared(set) : set.includes(highlighted)),
  });
  const rows = placement.layers.length;
  const columns = Math.max(...counts.map((row) => row.length), 0);
  const chosen = counts.some((row) => row.some((n) => n > 0));
  view.heatNote.textContent = chosen
    ? `${rows} layers (rows), ${columns} experts (columns). Color: how often the router chose an expert in measured steps.`
    : `${rows} layers (rows), ${columns} experts (columns). Nothing was measured yet: ask a question and watch.`;
}

function drawLegend(buttons) {
  const signature = JSON.stringify(buttons);
  if (view.legend.dataset.signature !== signature) {
    view.legend.dataset.signature = signature;
    view.legend.replaceChildren(
      ...buttons.map(([target, label, color]) => h("button", { type: "button", "data-target": target, onclick: () => { highlighted = highlighted === target ? null : target; drawExperts(); } },
        h("span", { class: `swatch ${color}` }), label)),
      h("span", { class: "scale" }, "never", h("span", { class: "ramp" }), "most often"));
  }
  for (const button of view.legend.querySelectorAll("button")) button.setAttribute("aria-pressed", String(String(highlighted) === button.dataset.target));
}

function drawTimings() {
  const { step_timings: { steps, mean_ms: mean }, prediction } = state;
  const predicted = prediction?.step_timings_ms;
  const band = prediction?.band_ms;
  const longest = Math.max(mean.total, band?.[1] ?? predicted?.total ?? 0);
  const row = (title, values, note) => h("div", { class: "bar-row" },
    h("div", { class: "bar-title" }, h("strong", {}, title), h("span", {}, note)),
    values ? stackedBar(COMPONENTS.map(([name, label]) => [name, label, values[name]]), longest) : h("div", { class: "bar none" }));
  const table = h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Milliseconds"), h("th", { scope: "col" }, "measured"), predicted && h("th", { scope: "col" }, "predicted"))),
    h("tbody", {}, COMPONENTS.map(([name, label, explanation]) => h("tr", {},
      h("th", { scope: "row" }, h("span", { class: `swatch component-${name}` }), label, h("small", {}, explanation)),
      h("td", {}, steps ? formatNumber(mean[name]) : "–"),
      predicted && h("td", {}, name === "waiting" ? "in experts" : formatNumber(predicted[name])))),
    h("tr", { class: "total" }, h("th", { scope: "row" }, "Total"), h("td", {}, steps ? formatNumber(mean.total) : "–"),
      predicted && h("td", {}, band ? `${formatNumber(band[0])} to ${formatNumber(band[1])}` : formatNumber(predicted.total)))));
  // The band over both bars.
  const place = () => {
    const mark = h("div", { class: "band", "aria-hidden": "true" });
    mark.style.left = `${(100 * band[0]) / longest}%`;
    mark.style.width = `${(100 * (band[1] - band[0])) / longest}%`;
    return mark;
  };
  const verdict = steps && band ? (mean.total < band[0] ? "faster than the band" : mean.total > band[1] ? `${formatNumber(mean.total / band[1])} times as long as the band's end` : "within the band") : "";
  view.timings.replaceChildren(
    row("Measured", steps ? mean : null, steps ? `${formatNumber(mean.total)} ms, ${meanOf(steps)}` : "not measured yet: one step in eight is measured"),
    predicted ? row("Predicted", predicted, `${formatNumber(predicted.total)} ms, ${formatNumber(prediction.tok_per_s)} tokens/s for one request`)
      : h("p", { class: "hint boxed" }, "No prediction: ", ...withCode(state.no_prediction_reason)),
    h("div", { class: "wide", tabindex: 0 }, table),
    ...(predicted ? [h("p", { class: "hint" }, `Predicted for ${prediction.basis}.`,
      band ? ` Expected between ${formatNumber(band[0])} and ${formatNumber(band[1])} ms (the framed part of the bars), as two calibrations in a row differ by 10 to 15 %${verdict ? `; measured: ${verdict}` : ""}.` : "")] : []));
  if (band && predicted) for (const bar of view.timings.querySelectorAll(".bar:not(.none)")) bar.append(place());
}

// `commands` in a sentence of the server.
const withCode = (text) => text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));

const MOST_ROWS = 30; // of the table of the charts

function drawHistory() {
  for (const button of view.span.children) button.setAttribute("aria-pressed", String(button.dataset.span === span));
  const data = span === "hours" && timeline ? timeline : state.history;
  // As many hours as there are, but at least one.
  const points = data === timeline ? [1, 3, 6, 12, 24].map((hours) => 60 * hours).find((n) => n >= data.running.length) : 150;
  view.tokens.show([["tokens", "tokens/s", data.tokens_per_s]], data.interval_s, points);
  view.requests.show([["running", "running", data.running], ["waiting", "waiting", data.waiting]], data.interval_s, points);
  view.sent.element.hidden = state.nodes === 1;
  view.sent.show([["sent", "per second", data.sent_bytes_per_s]], data.interval_s, points);
  const known = data.disk_free_bytes.find((bytes) => bytes !== null) ?? 0; // not before the first heartbeats
  const free = data.disk_free_bytes.map((bytes) => bytes ?? known);
  view.disk.element.hidden = !free.at(-1);
  view.disk.show([["disk", "on the fullest node", free]], data.interval_s, points);
  if (!view.table.open) return;
  const count = data.running.length;
  const step = Math.max(1, Math.ceil(count / MOST_ROWS));
  const rows = [];
  for (let index = count - 1; index >= 0; index -= step) rows.push(index);
  view.table.lastChild.replaceChildren(h("table", {},
    h("thead", {}, h("tr", {}, ["When", "Tokens/s", "Running", "Waiting", "Sent/s", "Free disk"].map((label) => h("th", { scope: "col" }, label)))),
    h("tbody", {}, rows.map((index) => h("tr", {}, h("th", { scope: "row" }, describeAgo((count - 1 - index) * data.interval_s)),
      h("td", {}, formatNumber(data.tokens_per_s[index])), h("td", {}, data.running[index]), h("td", {}, data.waiting[index]),
      h("td", {}, formatBytes(data.sent_bytes_per_s[index])), h("td", {}, data.disk_free_bytes[index] === null ? "–" : formatBytes(data.disk_free_bytes[index])))))));
}

// What API keys use. The server names only the key that this page has.
function drawUsage() {
  const usage = state.usage ?? [];
  view.usage.parentElement.hidden = !usage.some((row) => row.name !== "");
  const most = Math.max(1, ...usage.map((row) => row.generated_tokens));
  const nameOf = ({ name, keys }) => (name === "" ? "without a key" : name !== null ? h("strong", { dir: "auto" }, `${name} (yours)`) : keys > 1 ? `${keys} other keys` : "another key");
  const share = (tokens) => {
    const used = h("span", { class: "used" });
    used.style.width = `${(100 * tokens) / most}%`;
    return h("span", { class: "share", "aria-hidden": "true" }, used);
  };
  view.usage.replaceChildren(h("table", {},
    h("thead", {}, h("tr", {}, ["Key", "Requests now", "Prompt tokens", "Generated"].map((label) => h("th", { scope: "col" }, label)))),
    h("tbody", {}, usage.map((row) => h("tr", {}, h("th", { scope: "row" }, nameOf(row)), h("td", {}, row.requests),
      h("td", {}, formatNumber(row.prompt_tokens)), h("td", {}, share(row.generated_tokens), formatNumber(row.generated_tokens)))))));
}

// The newest first.
function drawFaults() {
  const faults = (timeline?.faults ?? []).toReversed();
  const signature = JSON.stringify(faults);
  if (view.faults.dataset.signature === signature) return;
  view.faults.dataset.signature = signature;
  if (!faults.length) {
    view.faults.replaceChildren(h("p", { class: "hint" }, "None since the start."));
    return;
  }
  view.faults.replaceChildren(h("ol", {}, faults.map((fault) => {
    const began = new Date(1000 * fault.began_at);
    const today = began.toDateString() === new Date().toDateString();
    const after = fault.ended_at === null ? null : fault.ended_at - fault.began_at;
    const [text, state] = fault.is_final ? ["not recovered", "bad"] : after === null ? ["recovering", "late"]
      : [after ? `recovered after ${after < 10 ? after.toFixed(1) : Math.round(after)} s` : "recovered", "good"];
    return h("li", {},
      h("time", { datetime: began.toISOString() }, today ? began.toLocaleTimeString() : began.toLocaleString()),
      h("span", {}, fault.reason), h("span", { class: `state ${state}` }, text));
  })));
}

// The lines that make another machine a node.
function addMachine() {
  const host = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname) ? "ADDRESS" : location.hostname;
  const line = (text) => h("div", { class: "command" }, h("code", { tabindex: "0" }, text), iconButton("copy", "Copy the line", () => copyText(text)));
  return h("details", { class: "more" }, h("summary", {}, "Add a machine"),
    h("p", { class: "hint" }, "On the head of a cluster (", h("code", {}, "cenacle up MODEL -n NODES"), " begins one), for a token that is valid for an hour:"),
    line("cenacle nodes --invite"),
    h("p", { class: "hint" }, "On the other machine, with the same version of Cenacle and that token:"),
    line(`cenacle join ${host}:4747 --token TOKEN`));
}

function formatDuration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}
