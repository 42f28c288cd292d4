// Charts: a stacked bar, lines over time, and the heat map of layers and experts.

import { h, s } from "./dom.js";

export function formatNumber(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(value < 1e7 ? 1 : 0)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(value < 1e5 ? 1 : 0)} k`;
  if (value >= 100 || Number.isInteger(value)) return String(Math.round(value));
  return value.toFixed(value >= 10 ? 1 : value >= 0.095 || value === 0 ? 2 : 3);
}

export function formatBytes(value) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(value < 10 * size ? 1 : 0)} ${unit}`;
  }
  return `${value} B`;
}

// The [red, green, blue] of CSS classes in the present theme, for a canvas.
export function colors(parent, classes) {
  return classes.map((name) => {
    const probe = h("span", { class: `swatch ${name}` });
    parent.append(probe);
    const color = getComputedStyle(probe).backgroundColor;
    probe.remove();
    return color.match(/[\d.]+/g).slice(0, 3).map(Number);
  });
}

// ---- a stacked bar: segments [component, label, milliseconds]; the longest bar is `longest` ms

export function stackedBar(segments, longest) {
  const description = segments.map(([, label, value]) => `${label} ${formatNumber(value)} ms`).join(", ");
  const bar = h("div", { class: "bar", role: "img", "aria-label": description });
  for (const [name, label, value] of segments) {
    const percent = (100 * Math.max(0, value)) / longest;
    const segment = h("span", { class: `segment component-${name}`, title: `${label}: ${formatNumber(value)} ms` }, percent > 9 ? formatNumber(value) : "");
    segment.style.width = `${percent}%`;
    bar.append(segment);
  }
  return bar;
}

// ---- lines over time

const WIDTH = 300;
const HEIGHT = 64;

// A chart that stays while its data changes. `show`: series [class, label, values], the newest value last; `points` fit
// into it, one every `intervalS`. Pointer and arrow keys read single values.
export class TimeChart {
  constructor(title, format = formatNumber) {
    Object.assign(this, { title, format });
    this.head = h("div", { class: "chart-title" });
    this.plot = h("div", { class: "plot", tabindex: "0", role: "img" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.axis = h("div", { class: "axis" });
    this.announcement = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.element = h("div", { class: "chart" }, this.head, h("div", { class: "over" }, this.plot, this.tip), this.axis, this.announcement);
    this.ago = null; // samples before the newest one, under the pointer or chosen by keys
    this.plot.addEventListener("pointermove", (event) => {
      const box = this.plot.getBoundingClientRect();
      this.select(Math.round(((box.right - event.clientX) / box.width) * (this.points - 1)));
    });
    this.plot.addEventListener("pointerleave", () => this.select(null));
    this.plot.addEventListener("blur", () => this.select(null));
    this.plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: 1, ArrowRight: -1, Home: Infinity, End: -Infinity }[event.key];
      if (event.key === "Escape") this.select(null);
      if (!step) return;
      event.preventDefault();
      this.select(Math.max(0, Math.min(this.count - 1, (this.ago ?? 0) + (this.ago === null && step > 0 ? 0 : step))));
      this.announcement.textContent = this.tip.textContent;
    });
  }

  show(series, intervalS, points) {
    Object.assign(this, { series, intervalS, points, count: Math.max(...series.map(([, , values]) => values.length)) });
    const top = niceCeiling(Math.max(1, ...series.map(([, , values]) => values.reduce((a, b) => Math.max(a, b), 0))));
    const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 6);
    const lines = series.filter(([, , values]) => values.length > 1).map(([name, , values]) => {
      const places = values.map((v, index) => `${this.x(values.length - 1 - index).toFixed(1)},${y(v).toFixed(1)}`);
      const left = this.x(values.length - 1).toFixed(1);
      return s("g", { class: `line ${name}` },
        s("path", { class: "area", d: `M${left},${HEIGHT}L${places.join("L")}L${WIDTH},${HEIGHT}Z` }),
        s("path", { class: "stroke", d: `M${places.join("L")}` }));
    });
    const latest = series.map(([name, label, values]) => [name, `${this.format(values.at(-1) ?? 0)} ${label}`]);
    this.head.replaceChildren(h("strong", {}, this.title), h("span", {}, latest.map(([name, text]) => h("span", { class: `key ${name}` }, text))));
    this.cursor = s("path", { class: "cursor", d: "" });
    this.plot.setAttribute("aria-label", `${this.title}: now ${latest.map(([, text]) => text).join(", ")}; top of the chart ${this.format(top)}; arrow keys read single values`);
    this.plot.replaceChildren(
      s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
        s("path", { class: "base", d: `M0,${HEIGHT - 1}H${WIDTH}` }), ...lines, this.cursor),
      h("span", { class: "maximum" }, this.format(top)));
    this.axis.replaceChildren(h("span", {}, describeAgo(intervalS * (points - 1))), h("span", {}, "now"));
    this.select(this.ago);
  }

  x(ago) {
    return WIDTH - (ago * WIDTH) / (this.points - 1);
  }

  select(ago) {
    this.ago = ago !== null && ago >= 0 && ago < this.count ? ago : null;
    this.tip.hidden = this.ago === null;
    this.cursor?.setAttribute("d", this.ago === null ? "" : `M${this.x(this.ago).toFixed(1)},0V${HEIGHT}`);
    if (this.ago === null) return;
    this.tip.replaceChildren(h("strong", {}, describeAgo(this.ago * this.intervalS)),
      ...this.series.map(([, label, values]) => h("span", {}, `${this.format(values.at(-1 - this.ago) ?? 0)} ${label}`)));
    const width = this.plot.clientWidth;
    const at = (this.x(this.ago) / WIDTH) * width - this.tip.offsetWidth / 2;
    this.tip.style.left = `${Math.max(0, Math.min(at, width - this.tip.offsetWidth))}px`;
  }
}

export function describeAgo(seconds) {
  if (seconds <= 0) return "now";
  if (seconds < 100) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 360) / 10} h ago`;
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].map((n) => n * unit).find((n) => n >= value);
}

// ---- the heat map

const LEFT = 34; // space for the layer numbers
const TOP = 16; // and for the expert numbers

export class HeatMap {
  constructor() {
    this.canvas = h("canvas", { tabindex: "0", role: "img" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.announcement = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.element = h("div", { class: "heat" }, this.canvas, this.tip, this.announcement);
    this.cell = null; // [layer, expert] under the pointer or chosen by keys
    this.canvas.addEventListener("pointermove", (event) => this.onPointer(event));
    this.canvas.addEventListener("pointerdown", (event) => this.onPointer(event));
    this.canvas.addEventListener("pointerleave", () => this.select(null));
    this.canvas.addEventListener("blur", () => this.select(null));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.paint()).observe(this.element);
  }

  show(data) {
    this.data = data;
    // For each layer and expert the index of its rank set.
    this.rankSets = data.placement.layers.map(([, pattern]) =>
      data.placement.patterns[pattern].flatMap(([set, count]) => Array(count).fill(set)));
    this.highest = data.counts.flat().reduce((a, b) => Math.max(a, b), 0);
    this.paint();
    if (this.cell) this.select(this.cell);
  }

  paint() {
    const width = this.element.clientWidth;
    if (!this.data || !width) return;
    const layers = this.data.placement.layers.length;
    const experts = Math.max(...this.rankSets.map((row) => row.length));
    const cellWidth = (width - LEFT) / experts;
    const cellHeight = Math.max(layers > 40 ? 5 : 6, Math.min(26, cellWidth, 420 / layers));
    const height = TOP + cellHeight * layers;
    const scale = devicePixelRatio || 1;
    this.box = { cellWidth, cellHeight, layers, experts };
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const style = getComputedStyle(this.element);
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    this.paintCells(pen, style, scale);
    this.paintNumbers(pen, style);
    if (this.cell) {
      const [layer, expert] = this.cell;
      pen.strokeStyle = style.color;
      pen.lineWidth = 1.5;
      pen.strokeRect(LEFT + expert * cellWidth - 0.5, TOP + layer * cellHeight - 0.5, Math.max(cellWidth, 3), Math.max(cellHeight, 3));
    }
    this.canvas.setAttribute("aria-label", `Heat map of ${layers} layers and ${experts} experts; arrow keys read single experts`);
  }

  paintCells(pen, style, scale) {
    const { placement, counts, palette, colorOf, isHighlighted } = this.data;
    const { cellWidth, cellHeight, layers } = this.box;
    const surface = style.backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
    const color = placement.rank_sets.map((set) => colorOf(set) ?? palette[0]);
    const bright = placement.rank_sets.map((set) => isHighlighted(set));
    const gap = Math.min(cellWidth, cellHeight) > 5 ? 1 : 0;
    // Whole device pixels: no seams between small cells.
    const snap = (value) => Math.round(value * scale) / scale;
    for (let layer = 0; layer < layers; layer++) {
      const top = snap(TOP + layer * cellHeight);
      const bottom = snap(TOP + (layer + 1) * cellHeight);
      for (const [expert, set] of this.rankSets[layer].entries()) {
        const share = this.highest ? Math.sqrt((counts[layer]?.[expert] ?? 0) / this.highest) : 0;
        const mix = (bright[set] ? 0.1 : 0.03) + (bright[set] ? 0.9 : 0.09) * share;
        pen.fillStyle = `rgb(${surface.map((v, i) => Math.round(v + (color[set][i] - v) * mix)).join(" ")})`;
        const left = snap(LEFT + expert * cellWidth);
        const right = snap(LEFT + (expert + 1) * cellWidth);
        pen.fillRect(left, top, right - left - gap, bottom - top - gap);
      }
    }
  }

  paintNumbers(pen, style) {
    const { cellWidth, cellHeight, layers, experts } = this.box;
    pen.fillStyle = style.color;
    pen.font = `10px ${style.fontFamily}`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const layerStep = labelStep(layers, 13 / cellHeight);
    for (let layer = 0; layer < layers; layer += layerStep) {
      pen.fillText(this.data.placement.layers[layer][0], LEFT - 6, TOP + (layer + 0.5) * cellHeight);
    }
    pen.textAlign = "center";
    const expertStep = labelStep(experts, 26 / cellWidth);
    for (let expert = 0; expert < experts; expert += expertStep) {
      pen.fillText(expert, LEFT + (expert + 0.5) * cellWidth, TOP / 2 - 1);
    }
  }

  exists([layer, expert]) {
    return this.rankSets[layer]?.[expert] !== undefined;
  }

  onPointer(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const { cellWidth, cellHeight } = this.box;
    const layer = Math.floor((event.clientY - bounds.top - TOP) / cellHeight);
    const expert = Math.floor((event.clientX - bounds.left - LEFT) / cellWidth);
    this.select(this.exists([layer, expert]) ? [layer, expert] : null);
  }

  onKey(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") this.select(null);
    if (!move) return;
    event.preventDefault();
    const next = this.cell ? [this.cell[0] + move[0], this.cell[1] + move[1]] : [0, 0];
    if (this.exists(next)) this.select(next);
    this.announcement.textContent = this.tip.textContent;
  }

  select(cell) {
    this.cell = cell;
    this.tip.hidden = cell === null;
    if (cell) this.showTip(cell);
    this.paint();
  }

  showTip([layer, expert]) {
    const { counts, placement, names } = this.data;
    const row = counts[layer] ?? [];
    const times = row[expert] ?? 0;
    const total = row.reduce((a, b) => a + b, 0);
    const load = total ? `, ${((times * row.length) / total).toFixed(2)}× an even share` : "";
    this.tip.replaceChildren(
      h("strong", {}, `Layer ${placement.layers[layer][0]}, expert ${expert}`),
      h("span", {}, `on ${names[this.rankSets[layer][expert]]}`),
      h("span", {}, `chosen ${times} time${times === 1 ? "" : "s"}${load}`));
    const { cellWidth, cellHeight } = this.box;
    const x = LEFT + (expert + 0.5) * cellWidth - this.tip.offsetWidth / 2;
    this.tip.style.left = `${Math.max(0, Math.min(x, this.element.clientWidth - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${TOP + (layer + 1) * cellHeight + 6}px`;
  }
}

function labelStep(count, minimum) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128].find((n) => n >= minimum) ?? count;
}
