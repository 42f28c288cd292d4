// What goes with a question: pictures, made small enough for a request, and files whose text the model reads.
// Chosen, taken, pasted or dropped.

import * as api from "./api.js";
import { $, h, setIcon, toast } from "./dom.js";
import { asText } from "./tree.js";

const LONGEST_SIDE = 1536; // pixels; the server makes them smaller still
const KEPT_BYTES = 400_000; // a picture of at most this is sent as it is, if the server reads its format
const KEPT_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MOST = 16;
const MOST_CHARACTERS = 1_000_000; // of a file
const MOST_PDF_BYTES = 50e6;
const SLOW_PDF_BYTES = 1e6; // of which reading may be seen

let images = []; // data: URLs
let files = []; // {name, text}
const counts = new WeakMap(); // tokens of a file
let model = null; // of /v1/models
let sees = false; // whether it can be shown pictures
let onChange = () => {};

export function start(changed) {
  onChange = changed;
  $("attach").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    add([...$("file").files]);
    $("file").value = ""; // the same file can be chosen again
  });
  $("input").addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])];
    if (!pasted.length) return;
    event.preventDefault();
    add(pasted);
  });
  const view = $("view-chat");
  view.addEventListener("dragover", (event) => {
    if ([...event.dataTransfer.items].some((item) => item.kind === "file")) event.preventDefault();
  });
  view.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault(); // else the browser would leave the page for the file
    add([...event.dataTransfer.files]);
  });
}

export function setModel(value) {
  model = value;
  sees = model?.architecture?.input_modalities?.includes("image") ?? false;
  setIcon($("attach"), "attach", sees ? "Add pictures, text files or PDF" : "Add text files or PDF");
}

export const count = () => images.length + files.length;

// What is attached, for a message; it is attached no more.
export function take() {
  const taken = { ...(images.length ? { images } : {}), ...(files.length ? { files } : {}) };
  set({});
  return taken;
}

export function set(message) {
  images = [...(message.images ?? [])];
  files = [...(message.files ?? [])];
  show();
}

async function add(chosen) {
  for (const file of chosen) {
    if (count() >= MOST) return toast(`At most ${MOST} files in a question`);
    try {
      if (file.type.startsWith("image/") && file.type !== "image/svg+xml") {
        if (!sees) {
          toast("This model cannot be shown pictures");
          continue;
        }
        images.push(await readPicture(file));
      } else {
        await addText(file);
      }
    } catch {
      toast(`${file.name || "The picture"} cannot be read`);
    }
    show();
  }
}

async function addText(file) {
  if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) return addPdf(file);
  if (/\.(docx?|xlsx?|pptx?|odt|epub)$/i.test(file.name)) {
    return toast(`${file.name}: only text and PDF are read. Copy its text, or convert it (pandoc)`);
  }
  if (file.size > 4 * MOST_CHARACTERS) return toast(`${file.name} is larger than a million characters`);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    return toast(`${file.name} is not a text file (UTF-8)`);
  }
  if (text.includes("\0")) return toast(`${file.name} is not a text file`);
  keepText(file.name || "text", text);
}

async function addPdf(file) {
  if (file.size > MOST_PDF_BYTES) return toast(`${file.name} is larger than 50 MB`);
  if (file.size > SLOW_PDF_BYTES) toast(`Reading ${file.name}…`);
  try {
    const { readText } = await import("./pdf.js");
    keepText(file.name || "text.pdf", await readText(await file.arrayBuffer(), MOST_CHARACTERS));
  } catch (error) {
    toast(`${file.name} ${/^(takes|is|has) /.test(error.message) ? error.message : "cannot be read"}`);
  }
}

function keepText(name, text) {
  if (text.length > MOST_CHARACTERS) return toast(`${name} is larger than a million characters`);
  const added = { name, text };
  files.push(added);
  countTokens(added);
}

// Asked once for a file: the server charges it like a prompt.
async function countTokens(file) {
  try {
    const { count: tokens } = await api.postJson("/tokenize", { model: model?.id, prompt: asText(file), add_special_tokens: false });
    counts.set(file, tokens);
    if (files.includes(file)) show();
  } catch { /* the size is shown without it */ }
}

async function readPicture(file) {
  if (file.size <= KEPT_BYTES && KEPT_TYPES.includes(file.type)) return asDataUrl(file);
  const picture = await createImageBitmap(file); // upright
  const scale = Math.min(1, LONGEST_SIDE / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function show() {
  const removing = (label, onclick) => {
    const button = h("button", { class: "icon", type: "button", onclick: () => { onclick(); show(); $("input").focus(); } });
    setIcon(button, "close", label);
    return button;
  };
  $("attached").hidden = !count();
  $("attached").replaceChildren(
    ...images.map((picture, index) => h("li", {}, image(picture, `Picture ${index + 1}`),
      removing(`Remove picture ${index + 1}`, () => images.splice(index, 1)))),
    ...files.map((file, index) => h("li", {}, chip(file), removing(`Remove ${file.name}`, () => files.splice(index, 1)))));
  onChange();
}

function chip(file) {
  const tokens = counts.get(file);
  const size = tokens === undefined ? `${file.text.length.toLocaleString("en")} characters` : `${tokens.toLocaleString("en")} tokens`;
  return h("span", { class: "file" }, h("strong", { dir: "auto" }, file.name), h("small", {}, size));
}

const image = (picture, label) => h("img", { src: picture, alt: label });

// Those of a message, for its bubble.
export function elements({ images: pictures = [], files: texts = [] }) {
  return [
    pictures.length ? h("div", { class: "pictures" }, pictures.map((p, i) => image(p, `Picture ${i + 1}`))) : null,
    texts.map((file) => h("details", { class: "attachment" }, h("summary", {}, chip(file)), h("pre", { tabindex: "0" }, file.text))),
  ];
}

// The content of a message for the server.
export function contentOf({ content, images: pictures = [], files: texts = [] }) {
  const text = [...texts.map(asText), content].filter(Boolean).join("\n\n");
  if (!pictures.length) return text;
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...parts, { type: "text", text }] : parts;
}
