// The cluster view: polls GET /cluster and shows nodes, experts, times and the last minutes.

import * as api from "./api.js";
import { bytes, colours, HeatMap, number, spark, stacked } from "./charts.js";
import { $, h } from "./dom.js";

const SHOWN_MS = 1000;
const HIDDEN_MS = 5000; // for the dot in the bar
const RECENT_MS = 60_000;

let state = null;
let failing = null; // why the last poll failed
let visible = false;
let timer = 0;
let placement = null;
let routed = null; // {steps, counts} since the group began
let past = []; // [{at, routed}]: to show what fired lately
let span = "all"; // or "recent"
let listener = () => {};
let view = null;

export function onState(tell) {
  listener = tell;
}

export function start() {
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  poll();
}

export function shown(now) {
  visible = now;
  if (now && timer) poll();
}

export function repaint() {
  if (view) draw();
}

export function problemOf(known) {
  if (failing) return failing;
  if (known?.status === "failed") return `The cluster has stopped: ${known.reason}`;
  if (known?.status === "recovering") {
    const what = known.lost_rank == null ? "The nodes are being started anew; answers go on then." : "A node was lost and is being started again; answers go on when it is back.";
    return `${what} (${known.reason})`;
  }
  return null;
}

async function poll() {
  clearTimeout(timer);
  timer = -1;
  try {
    const have = new URLSearchParams({ placement: placement?.id ?? "", steps: routed?.steps ?? "" });
    state = await api.json(`/cluster?${have}`, false);
    failing = null;
    placement = state.placement ?? placement;
    if (state.routed) take(state.routed);
  } catch (error) {
    failing = error.status === 401 ? "This server asks for a key: give it in the settings." : error.message;
  }
  listener(state);
  if (visible && !document.hidden) draw();
  clearTimeout(timer);
  timer = document.hidden ? 0 : setTimeout(poll, visible ? SHOWN_MS : HIDDEN_MS);
}

function take(fresh) {
  if (routed && fresh.steps < routed.steps) past = []; // the group began anew
  routed = fresh;
  const now = Date.now();
  past.push({ at: now, routed: fresh });
  while (past.length > 1 && now - past[1].at > RECENT_MS) past.shift();
}

function counts() {
  if (span === "all" || past.length < 2) return routed?.counts ?? [];
  const before = past[0].routed.counts;
  return routed.counts.map((row, layer) => row.map((n, expert) => n - before[layer][expert]));
}

// ---- drawing

const TERMS = [
  ["trunk", "Trunk", "attention, router and dense layers"],
  ["experts", "Experts", "computing the chosen experts"],
  ["exchange", "Exchange", "the sums between nodes themselves"],
  ["waiting", "Waiting", "for the slowest node, before a sum"],
  ["rest", "Rest", "output head, sampling, everything else"],
];

function build() {
  const part = (name, title, ...content) => h("section", { class: `card ${name}`, "aria-label": title },
    h("h2", {}, title), ...content);
  view = {
    lead: h("div", { class: "lead" }),
    figures: h("div", { class: "figures" }),
    nodes: h("div", { class: "nodes" }),
    legend: h("div", { class: "legend", role: "group", "aria-label": "Show the experts of one node" }),
    heat: new HeatMap(),
    heatNote: h("p", { class: "hint" }),
    span: h("div", { class: "choice", role: "group", "aria-label": "Which tokens are counted" },
      ...[["all", "Since the start"], ["recent", "Last minute"]].map(([name, label]) =>
        h("button", { type: "button", "data-span": name, onclick: () => { span = name; draw(); } }, label))),
    times: h("div", { class: "times" }),
    tokens: h("div", { class: "chart" }),
    queue: h("div", { class: "chart" }),
  };
  $("cluster").replaceChildren(
    view.lead, view.figures,
    part("card-nodes", "Nodes", view.nodes),
    part("card-experts", "Experts", view.span, view.legend, view.heat.element, view.heatNote),
    part("card-time", "Time of a token", view.times),
    part("card-history", "Last five minutes", view.tokens, view.queue));
}

function draw() {
  if (!state) {
    view = null;
    $("cluster").replaceChildren(h("div", { class: "empty" },
      failing ? [h("h1", {}, "Nothing to see yet"), h("p", {}, failing)] : h("p", { class: "loading" }, "Asking the cluster…")));
    return;
  }
  if (!view) build();
  $("cluster").classList.toggle("stale", Boolean(failing));
  drawLead();
  drawFigures();
  drawNodes();
  drawExperts();
  drawTimes();
  drawHistory();
}

function drawLead() {
  const { placed, nodes } = state;
  const experts = { whole: "each expert on one node", sliced: "a slice of every expert on every node", replicated: "experts on several nodes" }[placed.experts] ?? placed.experts;
  view.lead.replaceChildren(
    h("h1", {}, state.model),
    h("p", {}, [`${state.family}, ${bytes(placed.bytes)}`, nodes === 1 ? "one node" : `${nodes} nodes: ${experts}`,
      nodes > 1 && `${placed.exchanges} exchanges a token over ${placed.backend}`, `up for ${duration(state.uptime_s)}`,
      state.recoveries && `recovered ${state.recoveries === 1 ? "once" : `${state.recoveries} times`}`].filter(Boolean).join(" · ")));
}

function drawFigures() {
  const { load, counts: sums, terms, history, drafts } = state;
  const rate = history.tokens_per_s.at(-1) ?? 0;
  const busiest = Math.max(0, ...terms.rank_ms.map((r) => r.experts));
  const mean = terms.token_ms.experts;
  const items = [
    ["Tokens a second", rate ? number(rate) : "0", "all answers together"],
    ["Running", load.running, load.waiting ? `${load.waiting} waiting` : "none waiting"],
    ["Time of a token", terms.steps ? `${number(terms.token_ms.total)} ms` : "–", terms.steps ? `mean of ${terms.steps} measured` : "not measured yet"],
    ["Busiest node", state.nodes > 1 && mean ? `${(busiest / mean).toFixed(2)}×` : "–", "experts' time over the mean"],
    ["Tokens made", number(sums.generated_tokens), `${number(sums.prompt_tokens)} read, ${number(sums.requests)} answer${sums.requests === 1 ? "" : "s"}`],
    ...(drafts?.drafted ? [["Drafts kept", `${Math.round((100 * drafts.accepted) / drafts.drafted)} %`, `of ${number(drafts.drafted)} tokens guessed ahead`]] : []),
  ];
  view.figures.replaceChildren(...items.map(([title, value, note]) =>
    h("div", { class: "figure" }, h("span", { class: "title" }, title), h("strong", {}, value), h("span", { class: "note" }, note))));
}

function drawNodes() {
  const total = state.memory?.total_bytes;
  view.nodes.replaceChildren(...state.ranks.map((rank, at) => {
    const lost = state.lost_rank === at;
    const down = state.status !== "ok" || failing;
    const quiet = rank.silent_s > 3;
    const word = lost ? "lost" : state.status === "recovering" ? "starting" : state.status !== "ok" ? "ended" : failing ? "unknown" : quiet ? `silent for ${Math.round(rank.silent_s)} s` : "alive";
    const memory = h("div", { class: "meter" });
    if (total) {
      const held = h("span", { class: `held node-${at % 8}` });
      held.style.width = `${Math.min(100, (100 * (rank.resident_bytes ?? rank.weights_bytes)) / total)}%`;
      memory.append(held);
    }
    const own = state.terms.rank_ms[at];
    return h("div", { class: `node${lost ? " lost" : ""}` },
      h("div", { class: "name" }, h("span", { class: `swatch node-${at % 8}` }), h("strong", {}, `Node ${at}`),
        h("span", { class: `state ${lost || state.status === "failed" ? "bad" : down || quiet ? "late" : "good"}` }, word)),
      memory,
      h("dl", {},
        h("dt", {}, "Weights"), h("dd", {}, bytes(rank.weights_bytes)),
        h("dt", {}, "Memory"), h("dd", {}, rank.resident_bytes === null ? "–" : bytes(rank.resident_bytes), total && h("small", {}, ` of ${bytes(total)}`)),
        own && h("dt", {}, "Experts"), own && h("dd", {}, `${number(own.experts)} ms`),
        own && h("dt", {}, "Waits"), own && h("dd", {}, `${number(own.waiting)} ms`)),
      h("p", { class: "device", title: rank.device }, `${rank.device.replace(/^Device\((\w+), \d+\)/, "$1")} · process ${rank.pid}`));
  }));
}

let spotlight = null;
function drawExperts() {
  if (!placement) return;
  const names = placement.sets.map((set) => (set.length === 1 ? `Node ${set[0]}` : set.length === state.nodes ? "every node" : `Nodes ${set.join(", ")}`));
  const single = Array.from({ length: state.nodes }, (_, r) => r).filter((r) => placement.sets.some((set) => set.length === 1 && set[0] === r));
  const buttons = [
    ...single.map((r) => [r, `Node ${r}`, `node-${r % 8}`]),
    ...(placement.sets.some((set) => set.length > 1) ? [["shared", placement.sets.every((s) => s.length === state.nodes) ? "A slice on every node" : "On several nodes", "node-all"]] : []),
  ];
  const signature = JSON.stringify(buttons);
  if (view.legend.dataset.of !== signature) {
    view.legend.dataset.of = signature;
    view.legend.replaceChildren(
      ...buttons.map(([who, label, colour]) => h("button", { type: "button", "data-who": who, onclick: () => { spotlight = spotlight === who ? null : who; drawExperts(); } },
        h("span", { class: `swatch ${colour}` }), label)),
      h("span", { class: "scale" }, "never", h("span", { class: "ramp" }), "most often"));
  }
  for (const button of view.legend.querySelectorAll("button")) button.setAttribute("aria-pressed", String(String(spotlight) === button.dataset.who));
  for (const button of view.span.children) button.setAttribute("aria-pressed", String(button.dataset.span === span));
  const found = counts();
  const palette = colours(view.legend, buttons.map(([, , colour]) => colour));
  view.heat.show({
    placement, counts: found, names, palette,
    colourOf: (set) => palette[buttons.findIndex(([who]) => (set.length === 1 ? who === set[0] : who === "shared"))],
    lit: (set) => spotlight === null || (spotlight === "shared" ? set.length > 1 : set.includes(spotlight)),
    topK: state.placed.top_k,
  });
  const layers = placement.layers.length;
  const widest = Math.max(...found.map((row) => row.length), 0);
  const chosen = found.reduce((sum, row) => sum + row.reduce((a, b) => a + b, 0), 0);
  view.heatNote.textContent = chosen
    ? `${layers} layers down, ${widest} experts across: how often the router chose each in measured tokens (one in eight).`
    : `${layers} layers down, ${widest} experts across. Nothing has fired yet: ask something, and watch.`;
}

function drawTimes() {
  const { terms, predicted } = state;
  const most = Math.max(terms.token_ms.total, predicted?.terms_ms.total ?? 0);
  const row = (title, values, note) => h("div", { class: "bar-row" },
    h("div", { class: "bar-title" }, h("strong", {}, title), h("span", {}, note)),
    values ? stacked(TERMS.map(([name, label]) => [name, label, values[name]]), most) : h("div", { class: "bar none" }));
  const table = h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Milliseconds"), h("th", { scope: "col" }, "measured"), predicted && h("th", { scope: "col" }, "predicted"))),
    h("tbody", {}, TERMS.map(([name, label, about]) => h("tr", {},
      h("th", { scope: "row" }, h("span", { class: `swatch term-${name}` }), label, h("small", {}, about)),
      h("td", {}, terms.steps ? number(terms.token_ms[name]) : "–"),
      predicted && h("td", {}, name === "waiting" ? "in experts" : number(predicted.terms_ms[name]))))));
  view.times.replaceChildren(
    row("Measured", terms.steps ? terms.token_ms : null, terms.steps ? `${number(terms.token_ms.total)} ms, mean of ${terms.steps} measured` : "ask something first: one token in eight is measured"),
    predicted ? row("Predicted", predicted.terms_ms, `${number(predicted.terms_ms.total)} ms, ${number(predicted.tok_per_s)} tokens/s for one user`)
      : h("p", { class: "hint boxed" }, "No prediction to compare with: ", ...withCode(state.not_predicted)),
    h("div", { class: "wide", tabindex: 0 }, table),
    ...(predicted ? [h("p", { class: "hint" }, `Predicted for ${predicted.basis}.`)] : []));
}

// `commands` in a sentence of the server's.
const withCode = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));

function drawHistory() {
  const { history } = state;
  view.tokens.replaceChildren(...spark("Tokens a second", [["tokens", "tokens/s", history.tokens_per_s]], history.every_s));
  view.queue.replaceChildren(...spark("Answers", [["running", "running", history.running], ["waiting", "waiting", history.waiting]], history.every_s));
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}
