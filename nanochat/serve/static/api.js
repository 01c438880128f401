// The server: requests with the token, and answers as they stream.
import { $ } from "./dom.js";
import { tab } from "./store.js";

export class Failure extends Error {}

let token = tab.get("token");

// Fetch with the token; ask for it if the server requires one.
export async function call(path, options = {}) {
  for (;;) {
    const used = token;
    const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("Could not reach the server. Is it running, and is the network up?", { cause: "offline" });
    }
    if (response.status !== 401) return response;
    if (token !== used) continue; // another call has asked for it meanwhile
    if (!(await askToken(Boolean(used)))) throw new Failure("The server requires a token, and none was entered.", { cause: "token" });
  }
}

export const post = (path, body, options = {}) => call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options });

export async function getJson(path) {
  const response = await call(path);
  if (!response.ok) throw await refused(response);
  return response.json();
}

let asking = null;
function askToken(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("ask");
    dialog.querySelector(".wrong").hidden = !wrong;
    $("token").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => { asking = null; resolve(dialog.returnValue === "given"); }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export function listenToDialog() {
  $("ask-cancel").addEventListener("click", () => $("ask").close());
  $("ask").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    tab.set("token", token);
    $("ask").close("given");
  });
}

export async function refused(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch { /* not our server's JSON: a proxy's page, perhaps */ }
  if (response.status === 503 || response.status === 429) {
    const seconds = Number(response.headers.get("Retry-After"));
    const wait = seconds > 0 ? `Try again in ${seconds} second${seconds === 1 ? "" : "s"}.` : "Try again in a moment.";
    return new Failure(`The server is not available right now${message && ` (${message})`}. ${wait}`);
  }
  if (response.status === 400 && message) return new Failure(`The server rejected the request: ${message}.`);
  return new Failure(`The server returned status ${response.status}${message && `: ${message}`}.`);
}

// The data of server-sent events, as they arrive.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data) yield data;
    }
  }
}

const KINDS = { text: "text", python: "python", python_output: "output" };

// An answer of /v1/chat/completions as {pieces: [{kind, text}], tokens, finish, usage}; throws a Failure if it breaks off.
export async function* answer(request, signal) {
  const response = await post("/v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, { signal });
  if (!response.ok) throw await refused(response);
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new Failure(`The answer was interrupted: ${error.message}.`);
    const choice = choices[0] ?? {};
    const { content, nanochat_parts: parts = [] } = choice.delta ?? {};
    const pieces = [...(content ? [{ kind: "text", text: content }] : []), ...parts.map(({ type, text }) => ({ kind: KINDS[type], text }))];
    const tokens = (choice.logprobs?.content ?? []).map(({ token, logprob, top_logprobs }) => [token, logprob, top_logprobs.map((top) => [top.token, top.logprob])]);
    yield { pieces, tokens, finish: choice.finish_reason, usage };
  }
  throw new Failure("The answer was interrupted: the connection was closed.");
}
