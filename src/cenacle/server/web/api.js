// Talking to the server: the key, errors in words, the stream of an answer.

import * as store from "./store.js";

export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let asking = null;
let askForKey = async () => false;
export function onKeyNeeded(ask) {
  askForKey = ask;
}

// One dialog, however many requests were refused.
function keyGiven(refused) {
  asking ??= askForKey(refused).finally(() => { asking = null; });
  return asking;
}

async function request(path, options = {}, patient = true) {
  const key = store.key();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it running, and is this device in its network?");
  }
  if (answer.status === 401 && patient) {
    // Another request may have been given a key meanwhile.
    if (store.key() !== key || (await keyGiven(key !== ""))) return request(path, options);
  }
  if (!answer.ok) throw await inWords(answer);
  return answer;
}

async function inWords(answer) {
  let said = "";
  try {
    const body = await answer.json();
    said = body?.error?.message ?? body?.reason ?? "";
  } catch { /* not JSON: the status has to do */ }
  const after = Number(answer.headers.get("retry-after")) || null;
  const words = {
    401: "The server wants a valid key.",
    403: "The server does not allow this.",
    404: "The server does not know this address.",
    413: "This is more text than the server takes at once.",
    429: `The server is busy${after ? `: try again in ${after} s` : "; try again in a moment"}.`,
    503: "The model is not available.",
  }[answer.status] ?? `The server answered with status ${answer.status}.`;
  return new ServerError(said ? `${words} ${said}` : words, answer.status, after);
}

export async function json(path, patient = true) {
  return (await request(path, {}, patient)).json();
}

// Each event of the answer: {text} and {thought} pieces, {finish}, {usage}.
export async function* answer(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let complete = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      complete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message);
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning;
    if (thought) yield { thought };
    if (choice.delta?.content) yield { text: choice.delta.content };
    if (choice.finish_reason) yield { finish: choice.finish_reason };
  }
  if (!complete) throw new ServerError("The connection ended before the answer did.");
}

// The data of each server-sent event.
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection was lost.");
      }
      if (piece.done) return;
      rest += piece.value;
      const lines = rest.split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
