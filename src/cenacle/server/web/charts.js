// Drawing: a stacked bar, lines over the last minutes, and the heat map of layers x experts.

import { h, s } from "./dom.js";

export function number(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(value < 1e7 ? 1 : 0)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(value < 1e5 ? 1 : 0)} k`;
  if (value >= 100 || Number.isInteger(value)) return String(Math.round(value));
  return value.toFixed(value >= 10 ? 1 : value >= 0.095 || value === 0 ? 2 : 3);
}

export function bytes(value) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(value < 10 * size ? 1 : 0)} ${unit}`;
  }
  return `${value} B`;
}

// The colours that classes have now, in the present theme: what a canvas needs.
export function colours(within, classes) {
  return classes.map((name) => {
    const probe = h("span", { class: `swatch ${name}` });
    within.append(probe);
    const found = getComputedStyle(probe).backgroundColor;
    probe.remove();
    return found.match(/[\d.]+/g).slice(0, 3).map(Number);
  });
}

// ---- a stacked bar: segments [name, label, milliseconds], the longest bar being `most`

export function stacked(segments, most) {
  const words = segments.map(([, label, value]) => `${label} ${number(value)} ms`).join(", ");
  const bar = h("div", { class: "bar", role: "img", "aria-label": words });
  for (const [name, label, value] of segments) {
    const share = (100 * Math.max(0, value)) / most;
    const part = h("span", { class: `part term-${name}`, title: `${label}: ${number(value)} ms` }, share > 9 ? number(value) : "");
    part.style.width = `${share}%`;
    bar.append(part);
  }
  return bar;
}

// ---- lines over time: series [class, label, values], the newest last

const WIDTH = 300;
const HEIGHT = 64;
const POINTS = 150;

export function spark(title, series, everyS) {
  const most = niceCeiling(Math.max(1, ...series.flatMap(([, , values]) => values)));
  const x = (at, count) => WIDTH - ((count - 1 - at) * WIDTH) / (POINTS - 1);
  const y = (value) => HEIGHT - 2 - (value / most) * (HEIGHT - 6);
  const lines = series.filter(([, , v]) => v.length > 1).map(([name, , values]) => {
    const points = values.map((v, at) => `${x(at, values.length).toFixed(1)},${y(v).toFixed(1)}`);
    const from = x(0, values.length).toFixed(1);
    return s("g", { class: `line ${name}` },
      s("path", { class: "area", d: `M${from},${HEIGHT}L${points.join("L")}L${WIDTH},${HEIGHT}Z` }),
      s("path", { class: "stroke", d: `M${points.join("L")}` }));
  });
  const now = series.map(([, label, values]) => `${number(values.at(-1) ?? 0)} ${label}`).join(", ");
  return [
    h("div", { class: "chart-title" }, h("strong", {}, title),
      h("span", {}, series.map(([name, label, values]) => h("span", { class: `key ${name}` }, `${number(values.at(-1) ?? 0)} ${label}`)))),
    h("div", { class: "plot" },
      s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: now ${now}, at most ${number(most)} shown` },
        s("path", { class: "base", d: `M0,${HEIGHT - 1}H${WIDTH}` }), ...lines),
      h("span", { class: "most" }, number(most))),
    h("div", { class: "axis" }, h("span", {}, `${Math.round((POINTS * everyS) / 60)} min ago`), h("span", {}, "now")),
  ];
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].map((n) => n * unit).find((n) => n >= value);
}

// ---- the heat map

const LEFT = 34; // room for the layers' numbers
const TOP = 16; // and the experts'

export class HeatMap {
  constructor() {
    this.canvas = h("canvas", { tabindex: "0", role: "img" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.said = h("p", { class: "sr", "aria-live": "polite" });
    this.element = h("div", { class: "heat" }, this.canvas, this.tip, this.said);
    this.at = null; // [layer, expert] under the pointer or the keys
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.mark(null));
    this.canvas.addEventListener("blur", () => this.mark(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paint()).observe(this.element);
  }

  show(data) {
    this.data = data;
    this.holders = data.placement.layers.map(([, map]) =>
      data.placement.maps[map].flatMap(([set, many]) => Array(many).fill(set)));
    const chosen = data.counts.flat();
    this.most = chosen.reduce((a, b) => Math.max(a, b), 0);
    this.paint();
    if (this.at) this.mark(this.at);
  }

  paint() {
    const width = this.element.clientWidth;
    if (!this.data || !width) return;
    const { placement, counts, palette, colourOf, lit } = this.data;
    const layers = placement.layers.length;
    const experts = Math.max(...this.holders.map((row) => row.length));
    const across = (width - LEFT) / experts;
    const down = Math.max(layers > 40 ? 5 : 6, Math.min(26, across, 420 / layers < across ? 420 / layers : across));
    const height = TOP + down * layers;
    const scale = devicePixelRatio || 1;
    this.box = { across, down, layers, experts };
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const style = getComputedStyle(this.element);
    const surface = style.backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const colour = placement.sets.map((set) => colourOf(set) ?? palette[0]);
    const bright = placement.sets.map((set) => lit(set));
    const gap = Math.min(across, down) > 5 ? 1 : 0;
    for (let layer = 0; layer < layers; layer++) {
      // Whole device pixels: no seams between small cells.
      const top = Math.round((TOP + layer * down) * scale) / scale;
      const bottom = Math.round((TOP + (layer + 1) * down) * scale) / scale;
      for (let expert = 0; expert < this.holders[layer].length; expert++) {
        const set = this.holders[layer][expert];
        const share = this.most ? Math.sqrt((counts[layer]?.[expert] ?? 0) / this.most) : 0;
        const mix = (bright[set] ? 0.1 : 0.03) + (bright[set] ? 0.9 : 0.09) * share;
        pen.fillStyle = `rgb(${surface.map((v, i) => Math.round(v + (colour[set][i] - v) * mix)).join(" ")})`;
        const left = Math.round((LEFT + expert * across) * scale) / scale;
        const right = Math.round((LEFT + (expert + 1) * across) * scale) / scale;
        pen.fillRect(left, top, right - left - gap, bottom - top - gap);
      }
    }
    pen.fillStyle = style.color;
    pen.font = `10px ${style.fontFamily}`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const everyLayer = step(layers, 13 / down);
    for (let layer = 0; layer < layers; layer += everyLayer) {
      pen.fillText(placement.layers[layer][0], LEFT - 6, TOP + (layer + 0.5) * down);
    }
    pen.textAlign = "center";
    const everyExpert = step(experts, 26 / across);
    for (let expert = 0; expert < experts; expert += everyExpert) {
      pen.fillText(expert, LEFT + (expert + 0.5) * across, TOP / 2 - 1);
    }
    if (this.at) {
      const [layer, expert] = this.at;
      pen.strokeStyle = style.color;
      pen.lineWidth = 1.5;
      pen.strokeRect(LEFT + expert * across - 0.5, TOP + layer * down - 0.5, Math.max(across, 3), Math.max(down, 3));
    }
    this.canvas.setAttribute("aria-label", `Heat map of ${layers} layers and ${experts} experts; arrow keys read single experts`);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const { across, down } = this.box;
    const layer = Math.floor((event.clientY - box.top - TOP) / down);
    const expert = Math.floor((event.clientX - box.left - LEFT) / across);
    this.mark(this.holders[layer]?.[expert] === undefined ? null : [layer, expert]);
  }

  key(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") this.mark(null);
    if (!move) return;
    event.preventDefault();
    const [layer, expert] = this.at ? [this.at[0] + move[0], this.at[1] + move[1]] : [0, 0];
    if (this.holders[layer]?.[expert] !== undefined) this.mark([layer, expert]);
    this.said.textContent = this.tip.textContent;
  }

  mark(at) {
    this.at = at;
    this.tip.hidden = at === null;
    if (at) {
      const [layer, expert] = at;
      const { counts, placement, names } = this.data;
      const row = counts[layer] ?? [];
      const times = row[expert] ?? 0;
      const all = row.reduce((a, b) => a + b, 0);
      const fair = all ? (times * row.length) / all : 0;
      this.tip.replaceChildren(
        h("strong", {}, `Layer ${placement.layers[layer][0]}, expert ${expert}`),
        h("span", {}, `on ${names[this.holders[layer][expert]]}`),
        h("span", {}, `chosen ${times} time${times === 1 ? "" : "s"}${all ? `, ${fair.toFixed(2)}× its even share` : ""}`));
      const { across, down } = this.box;
      const x = LEFT + (expert + 0.5) * across;
      const y = TOP + (layer + 1) * down + 6;
      const room = this.element.clientWidth;
      this.tip.style.left = `${Math.max(0, Math.min(x - this.tip.offsetWidth / 2, room - this.tip.offsetWidth))}px`;
      this.tip.style.top = `${y}px`;
    }
    this.paint();
  }
}

function step(count, atLeast) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128].find((n) => n >= atLeast) ?? count;
}
