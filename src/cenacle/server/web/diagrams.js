// Mermaid diagrams as pictures, when asked for: drawn by mermaid in a sandboxed frame, which is loaded with the first one.

import { h } from "./dom.js";

const LONGEST_MS = 30_000; // until it is drawn
const HIGHEST = 2000; // pixels
const MOST_CHARACTERS = 300; // of a problem

// A frame with the diagram; `onProblem` gets why there is none.
export function diagram(text, onProblem) {
  const frame = h("iframe", { class: "diagram", sandbox: "allow-scripts", src: "/static/mermaid/frame.html", title: "Diagram", referrerpolicy: "no-referrer" });
  const fail = (problem) => {
    stop();
    onProblem(problem);
  };
  const receive = ({ source, data }) => {
    if (source !== frame.contentWindow || !data) return;
    if (data.ready === true) {
      const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
      frame.contentWindow.postMessage({ text, dark }, "*");
    } else if (typeof data.problem === "string") {
      fail(data.problem.slice(0, MOST_CHARACTERS));
    } else if (data.width > 0 && data.height > 0) {
      stop();
      const width = Math.min(frame.clientWidth, data.width);
      frame.style.height = `${Math.ceil(Math.min(HIGHEST, (data.height * width) / data.width))}px`;
      frame.classList.add("drawn");
    }
  };
  const timer = setTimeout(() => fail("it takes too long to draw"), LONGEST_MS);
  const stop = () => {
    clearTimeout(timer);
    removeEventListener("message", receive);
  };
  addEventListener("message", receive);
  return frame;
}
