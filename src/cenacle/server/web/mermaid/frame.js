// Draws one diagram in a document without an origin: what a model writes can reach neither the page nor the network, only send messages
// to the page, which takes two numbers or a text from them.

/* global mermaid */
addEventListener("message", async ({ data, source }) => {
  if (source !== parent) return;
  try {
    mermaid.initialize({
      startOnLoad: false, securityLevel: "strict", theme: data.dark ? "dark" : "default", suppressErrorRendering: true,
      maxTextSize: 50_000, maxEdges: 500, fontFamily: "system-ui, sans-serif",
    });
    const { svg } = await mermaid.render("diagram", data.text);
    document.body.innerHTML = svg;
    const { width, height } = document.querySelector("svg").viewBox.baseVal;
    parent.postMessage({ width, height }, "*");
  } catch (error) {
    parent.postMessage({ problem: String(error?.message ?? error) }, "*");
  }
});
parent.postMessage({ ready: true }, "*");
