// Pictures that go with a question: chosen, taken, pasted or dropped; small enough for a request.

import { $, h, setIcon, toast } from "./dom.js";

const LONGEST_SIDE = 1536; // pixels; the server makes them smaller still
const KEPT_BYTES = 400_000; // a file of at most this is sent as it is, if the server reads its format
const KEPT_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MOST = 16;

let attached = []; // data: URLs
let sees = false; // whether the model can be shown pictures
let onChange = () => {};

export function start(changed) {
  onChange = changed;
  $("attach").addEventListener("click", () => $("picture").click());
  $("picture").addEventListener("change", () => {
    add([...$("picture").files]);
    $("picture").value = ""; // the same file can be chosen again
  });
  $("input").addEventListener("paste", (event) => {
    const files = pictureFiles(event.clipboardData);
    if (!files.length) return;
    event.preventDefault();
    add(files);
  });
  const view = $("view-chat");
  view.addEventListener("dragover", (event) => {
    if ([...event.dataTransfer.items].some((item) => item.kind === "file")) event.preventDefault();
  });
  view.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault(); // else the browser would leave the page for the file
    const files = pictureFiles(event.dataTransfer);
    if (files.length) add(files);
    else toast("Only pictures can be attached");
  });
}

const pictureFiles = (data) => [...(data?.files ?? [])].filter((file) => file.type.startsWith("image/"));

export function setSees(value) {
  sees = value;
  $("attach").hidden = !sees;
}

export const count = () => attached.length;

// The attached pictures, which are attached no more.
export function take() {
  const taken = attached;
  set([]);
  return taken;
}

export function set(pictures) {
  attached = pictures;
  show();
}

async function add(files) {
  if (!sees) return toast("This model cannot be shown pictures");
  for (const file of files) {
    if (attached.length >= MOST) return toast(`At most ${MOST} pictures in a question`);
    try {
      attached.push(await read(file));
    } catch {
      toast(`${file.name || "The picture"} cannot be read`);
    }
    show();
  }
}

async function read(file) {
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
  $("attached").hidden = !attached.length;
  $("attached").replaceChildren(...attached.map((picture, index) => {
    const button = h("button", { class: "icon", type: "button", onclick: () => set(attached.filter((_, i) => i !== index)) });
    setIcon(button, "close", `Remove picture ${index + 1}`);
    return h("li", {}, image(picture, `Picture ${index + 1}`), button);
  }));
  onChange();
}

const image = (picture, label) => h("img", { src: picture, alt: label });

// Those of a message, for its bubble.
export function elements(message) {
  const pictures = message.images ?? [];
  return pictures.length ? h("div", { class: "pictures" }, pictures.map((p, i) => image(p, `Picture ${i + 1}`))) : null;
}

// The content of a message for the server.
export function contentOf({ content, images }) {
  if (!images?.length) return content;
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return content ? [...parts, { type: "text", text: content }] : parts;
}
