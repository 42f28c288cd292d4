// Elements and icons. Text stays text: nothing on this page parses HTML.

const PATHS = {
  menu: "M4 6h16M4 12h16M4 18h16",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M5 12l7-7 7 7",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M5 12l7 7 7-7",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  wrap: "M4 6h16M4 12h13a3.5 3.5 0 0 1 0 7h-4M15.5 16.5L13 19l2.5 2.5M4 18h5",
  check: "M4 12l5 5L20 6",
  retry: "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  attach: "M20 11.5l-8 8a5 5 0 0 1-7-7l8.5-8.5a3.3 3.3 0 0 1 4.7 4.7L9.8 17a1.7 1.7 0 0 1-2.4-2.4L15 7",
  prompt: "M5 4h14v16H5zM9 9h6M9 13h6",
  pin: "M9 4h6l-1 6 3 3v2H7v-2l3-3zM12 15v5",
  back: "M14 6l-6 6 6 6",
  forward: "M10 6l6 6-6 6",
  close: "M6 6l12 12M18 6L6 18",
  tool: "M14.5 6.5a4 4 0 0 1 5-1.2l-2.6 2.6 1.2 2 2.2.6 1-1a4 4 0 0 1-5.4 4.6L9 21l-4-4 7-6.8a4 4 0 0 1 2.5-3.7z",
  share: "M12 15V4M8 7.5L12 4l4 3.5M5 12v8h14v-8",
  columns: "M4 5h6.5v14H4zM13.5 5H20v14h-6.5z",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
};
const SVG = "http://www.w3.org/2000/svg";

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function icon(name) {
  return s("svg", { class: "glyph", viewBox: "0 0 24 24", "aria-hidden": "true" },
    s("path", { d: PATHS[name] }));
}

export function setIcon(button, name, label) {
  button.querySelector("svg.glyph")?.remove();
  button.prepend(icon(name));
  if (label) {
    button.setAttribute("aria-label", label);
    button.title = label;
  }
}

export function iconButton(name, label, onclick) {
  const button = h("button", { class: "icon", type: "button", onclick });
  setIcon(button, name, label);
  return button;
}

export const $ = (id) => document.getElementById(id);

let hideTimer = 0;
export function toast(text, action, onclick) {
  const box = $("toast");
  box.replaceChildren(h("span", {}, text));
  if (action) {
    box.append(h("button", { class: "link", type: "button", onclick: () => { box.hidden = true; onclick(); } }, action));
  }
  box.hidden = false;
  clearTimeout(hideTimer);
  hideTimer = setTimeout(() => { box.hidden = true; }, action ? 8000 : 2500);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The clipboard API exists only on https and localhost.
    const area = h("textarea", { class: "visually-hidden", readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) return toast("The browser does not allow copying");
  }
  toast("Copied");
}

export const canShare = () => Boolean(navigator.share); // with the system's list of programs; phones have one, and https is needed

export async function share(title, text) {
  try {
    await navigator.share({ title, text });
  } catch (error) {
    if (error.name !== "AbortError") toast("The browser does not allow sharing");
  }
}

export function download(name, parts, type) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
