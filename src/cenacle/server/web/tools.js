// The test bench for tools: what is offered to the model, and its calls as cards. Nothing is executed: the user types what a
// call results in, or the tool's own `result` does.

import { h, icon } from "./dom.js";

export const EXAMPLE = `[
  {
    "name": "weather",
    "description": "The weather of a place today",
    "parameters": {
      "type": "object",
      "properties": {"place": {"type": "string"}},
      "required": ["place"]
    },
    "result": {"sky": "clear", "celsius": 21}
  }
]`;

// [{name, description, parameters, result (text, or undefined)}] of the settings' JSON; also in the forms of the APIs. An
// Error says what is wrong.
export function parse(text) {
  if (!text.trim()) return [];
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  if (!Array.isArray(list)) throw new Error("Tools are a JSON list: [{…}, {…}]");
  const names = new Set();
  return list.map((value, index) => {
    const tool = value?.function ?? value;
    const place = `Tool ${index + 1}`;
    if (typeof tool?.name !== "string" || !/^[\w.-]{1,64}$/.test(tool.name)) throw new Error(`${place} needs a name of letters, digits, _, - and .`);
    if (names.has(tool.name)) throw new Error(`${place}: there is another ${tool.name}`);
    names.add(tool.name);
    const parameters = tool.parameters ?? tool.input_schema ?? { type: "object", properties: {} };
    if (parameters === null || typeof parameters !== "object" || Array.isArray(parameters)) throw new Error(`${place}: parameters are a JSON schema, an object`);
    const { result } = { ...tool, ...value };
    return {
      name: tool.name, description: typeof tool.description === "string" ? tool.description : "", parameters,
      result: result === undefined || typeof result === "string" ? result : JSON.stringify(result),
    };
  });
}

// For a request.
export const offered = (tools) => tools.map(({ name, description, parameters }) => ({ type: "function", function: { name, description, parameters } }));

// Adds the pieces of calls that a stream brought to those of a message.
export function addPieces(message, pieces) {
  message.calls ??= [];
  for (const { index, id, function: piece } of pieces) {
    const at = Number.isInteger(index) && index >= 0 && index < message.calls.length ? index : message.calls.length;
    message.calls[at] ??= { id: id ?? `call_${at}`, name: "", arguments: "" };
    message.calls[at].name += piece?.name ?? "";
    message.calls[at].arguments += piece?.arguments ?? "";
  }
}

const NO_RESULT = "No result was given.";

// A message with calls as the server reads it: the calls, and after them a message for each result.
export function asMessages(content, calls) {
  return [
    { role: "assistant", content: content || null, tool_calls: calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } })) },
    ...calls.map((c) => ({ role: "tool", tool_call_id: c.id, content: c.result ?? NO_RESULT })),
  ];
}

// Shows the calls of a message in `box`. `give(results)` is there when their results are wanted.
export function show(box, calls, give) {
  const signature = JSON.stringify([calls, Boolean(give)]);
  if (box.dataset.signature === signature) return;
  box.dataset.signature = signature;
  const missing = give ? calls.filter((c) => c.result === undefined) : [];
  const fields = new Map(missing.map((call) => [call, h("textarea", {
    rows: 2, dir: "auto", spellcheck: "false", "aria-label": `Result of ${call.name}`, placeholder: "What the call results in: text or JSON",
    onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(); },
  })]));
  const send = () => give(calls.map((c) => c.result ?? fields.get(c).value));
  box.replaceChildren(...calls.map((call) => h("section", { class: "call", "aria-label": `Call of ${call.name}` },
    h("p", { class: "call-head" }, icon("tool"), h("strong", {}, call.name), h("span", {}, "call")),
    h("pre", { tabindex: "0" }, indented(call.arguments)),
    call.result === undefined ? fields.get(call) ?? null
      : [h("p", { class: "call-head" }, h("span", {}, "Result")), h("pre", { tabindex: "0", dir: "auto" }, indented(call.result))])));
  if (give && calls.length) {
    const label = missing.length > 1 ? "Give the results" : missing.length ? "Give the result" : "Go on with what is given";
    box.append(h("p", { class: "give" }, h("button", { class: "decide", type: "button", onclick: send }, label), missing.length > 0 && h("span", { class: "hint" }, "Nothing is executed.")));
  }
}

// JSON with lines; as it is where it is short or a number would not stay the same.
function indented(text) {
  if (text.length <= 60) return text;
  const dense = (json) => json.replace(/\s/g, "");
  try {
    const value = JSON.parse(text);
    return dense(JSON.stringify(value)) === dense(text) ? JSON.stringify(value, null, 2) : text;
  } catch {
    return text; // not complete, or no JSON
  }
}
