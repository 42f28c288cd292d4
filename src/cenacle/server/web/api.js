// Requests to the server: the API key, error messages, streamed answers.

import * as store from "./store.js";

export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  // Whether the server went away: then it is worth trying again when it is back.
  get wasLost() {
    return this.status === 0 && this.isConnection === true;
  }
}

const connectionError = (message) => Object.assign(new ServerError(message), { isConnection: true });

let keyRequest = null; // the open key dialog
let promptForKey = async () => false;
export function onKeyNeeded(prompt) {
  promptForKey = prompt;
}

// One dialog, however many requests failed with 401.
function requestKey(wasRejected) {
  keyRequest ??= promptForKey(wasRejected).finally(() => { keyRequest = null; });
  return keyRequest;
}

async function request(path, options = {}, mayPrompt = true) {
  const key = store.key();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw connectionError("Cannot reach the server. Check that it is running and that this device is on its network.");
  }
  if (response.status === 401 && mayPrompt) {
    // The key may have changed while this request was under way.
    if (store.key() !== key || (await requestKey(key !== ""))) return request(path, options);
  }
  if (!response.ok) throw await toServerError(response);
  return response;
}

async function toServerError(response) {
  let detail = "";
  let isWaiting = false; // for the machines of a cluster
  try {
    const body = await response.json();
    detail = body?.error?.message ?? body?.reason ?? "";
    isWaiting = body?.error?.code === "nodes_missing";
  } catch { /* not JSON: the status has to do */ }
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  const message = {
    401: "The server requires a valid API key.",
    403: "The server does not allow this request.",
    404: "The server does not know this address.",
    413: "The request is larger than the server accepts.",
    429: `The server is busy. Try again in ${retryAfter ? `${retryAfter} s` : "a moment"}.`,
    503: "The model is not available.",
  }[response.status] ?? `The server returned status ${response.status}.`;
  if (isWaiting) {
    const missing = detail.replace(/^no model is loaded yet(: )?/, "");
    return new ServerError(`The cluster is waiting for machines${missing && `: ${missing}`}. On each missing one run the line that “cenacle up” has printed; “cenacle nodes --invite” prints a new one.`, response.status, retryAfter);
  }
  return new ServerError(detail ? `${message} ${detail}` : message, response.status, retryAfter);
}

export async function getJson(path, mayPrompt = true) {
  return (await request(path, {}, mayPrompt)).json();
}

export async function postJson(path, body) {
  return (await request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) })).json();
}

// The events of a streamed answer: {text}, {reasoning}, {calls} (pieces of tool calls), {finish}, {usage}.
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let complete = false;
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") {
      complete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message);
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const reasoning = choice.delta?.reasoning_content ?? choice.delta?.reasoning;
    if (reasoning) yield { reasoning };
    if (Array.isArray(choice.delta?.tool_calls)) yield { calls: choice.delta.tool_calls };
    if (choice.delta?.content) yield { text: choice.delta.content };
    if (choice.finish_reason) yield { finish: choice.finish_reason };
  }
  if (!complete) throw connectionError("The connection closed before the answer was complete.");
}

// The data of each server-sent event.
async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let chunk;
      try {
        chunk = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw connectionError("The connection was lost.");
      }
      if (chunk.done) return;
      rest += chunk.value;
      const lines = rest.split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
