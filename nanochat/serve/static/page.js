"use strict";

// ---- Constants -----------------------------------------------------------------------------------------------------
// The server's limits and defaults; nanochat/serve/schema.py has the same numbers, and a test compares them.
const LIMITS = { temperature: [0, 2], top_k: [0, 200], message: 8000, total: 32000, messages: 500 };
const DEFAULTS = { temperature: 0.8, top_k: 50 };
const IDEAS = [
  ["Arithmetic", "What is 348 + 1,279?"],
  ["Spelling", "How many r are in strawberry?"],
  ["A fact", "What is the capital of France?"],
  ["A short text", "Write two sentences about the sea."],
];
const TOOL = "\uFFFC"; // stands for a tool call in the text of an answer; removed from the model's own text

// ---- Documents -----------------------------------------------------------------------------------------------------
const $ = (id) => document.getElementById(id);

// An element. Children are nodes or strings, and strings become text nodes: nothing here parses markup.
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

const iconButton = (name, label, click) => h("button", { class: "icon", type: "button", "aria-label": label, title: label, click }, icon(name));

async function copy(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard over plain http, except on localhost
    const area = h("textarea", { class: "hide" });
    area.value = text;
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  announce(copied ? "Copied" : "Copy failed");
  button.replaceChildren(icon(copied ? "done" : "alert"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

// A screen reader does not read the same text twice: a no-break space makes it different.
function announce(text) {
  $("live").textContent = $("live").textContent === text ? `${text}\u00A0` : text;
}

// ---- State: one value, replaced and never changed -------------------------------------------------------------------
// items: {id, role: "user", text} | {id, role: "assistant", pieces: [{kind, text}], status, remark, error} | {id, role: "note", text, wrong}
// status: "streaming" | "done" | "stopped" | "failed"
let state = { items: [], settings: { ...DEFAULTS }, editing: null };
let running = null; // {id, controller} of the answer in progress
let before = null; // the items before the last change that removed some, for Undo
let identifier = 0;

const length = (text) => { let n = 0; for (const _ of text) n++; return n; }; // characters as the server counts them
const number = (n) => n.toLocaleString("en");
const store = (key, value) => { try { sessionStorage.setItem(key, value); } catch { /* full or switched off: nothing survives a reload then */ } };
const stored = (key) => { try { return sessionStorage.getItem(key); } catch { return null; } };

function change(changes) {
  state = { ...state, ...changes };
  requestRender();
}

function patch(id, update) {
  change({ items: state.items.map((item) => (item.id === id ? { ...item, ...update(item) } : item)) });
}

// Without empty lines around it and without unpaired surrogates.
const tidy = (text) => text.replace(/^\s*\n/, "").trimEnd().toWellFormed();
const withId = (item) => ({ id: ++identifier, ...item });
const pending = () => withId({ role: "assistant", pieces: [], status: "streaming", remark: "", error: "" });

function save() {
  store("nanochat.chat", JSON.stringify({ items: state.items, settings: state.settings, draft: $("text").value }));
}

function restore() {
  try {
    const { items, settings, draft } = JSON.parse(stored("nanochat.chat"));
    const cut = (item) => (item.status === "streaming" ? { ...item, status: "stopped", remark: "Stopped by a page reload." } : item);
    state = { ...state, settings: { ...DEFAULTS, ...settings }, items: items.map((item) => withId({ ...cut(item), id: ++identifier })) };
    $("text").value = draft;
  } catch { /* nothing stored, or by another version: start empty */ }
}

// ---- What is sent to the model -------------------------------------------------------------------------------------------
// An answer is sent back as it came: a string, or parts if it has tool calls.
const PARTS = { text: "text", python: "python", output: "python_output" };
function content({ role, text, pieces }) {
  if (role === "user") return text;
  if (pieces.some((piece) => piece.kind !== "text")) return pieces.map((piece) => ({ type: PARTS[piece.kind], text: piece.text }));
  return pieces.map((piece) => piece.text).join("");
}

// Messages without an answer, and their empty answers: not sent, since roles must alternate.
function unanswered(items) {
  const turns = items.filter((item) => item.role !== "note");
  const lost = turns.filter((item, i) => item.role === "assistant" && !item.pieces.some((piece) => piece.text) && i < turns.length - 1);
  return new Set(lost.flatMap((item) => [item.id, turns[turns.indexOf(item) - 1].id]));
}

function messages(items) {
  const out = unanswered(items);
  return items
    .filter((item) => item.role !== "note" && !out.has(item.id))
    .map((item) => ({ role: item.role, content: content(item) }));
}

const size = (turn) => (typeof turn.content === "string" ? length(turn.content) : turn.content.reduce((sum, part) => sum + length(part.text), 0));

// Why the server would reject this text after these items; "" if it would not.
function refusal(text, items) {
  if (length(text) > LIMITS.message) return `This message has ${number(length(text))} characters; the limit is ${number(LIMITS.message)}.`;
  const turns = messages(items);
  const total = turns.reduce((sum, turn) => sum + size(turn), length(text));
  const long = turns.find((turn) => size(turn) > LIMITS.message);
  if (long) return `An earlier answer has ${number(size(long))} characters; the limit is ${number(LIMITS.message)} per message. Start a new chat, or edit an earlier message.`;
  if (total > LIMITS.total) return `With this message the conversation has ${number(total)} characters; the limit is ${number(LIMITS.total)}. Start a new chat, or edit an earlier message.`;
  if (turns.length + 1 > LIMITS.messages) return `The conversation has reached its limit of ${number(LIMITS.messages)} messages. Start a new chat.`;
  return "";
}

// ---- The server -----------------------------------------------------------------------------------------------------
class Failure extends Error {}

let token = stored("nanochat.token");

// Fetch with the token; ask for it if the server requires one.
async function call(path, options = {}) {
  for (;;) {
    const used = token;
    const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("Could not reach the server. Is it running, and is the network up?");
    }
    if (response.status !== 401) return response;
    if (token !== used) continue; // another call has asked for it meanwhile
    if (!(await askToken(Boolean(used)))) throw new Failure("The server requires a token, and none was entered.", { cause: "token" });
  }
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

async function refused(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch { /* not our server's JSON: a proxy's page, perhaps */ }
  if (response.status === 503) {
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
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

// Append a token of text, or of a tool call or its output, to the pieces.
function appended(pieces, kind, text) {
  const last = pieces.at(-1);
  return last?.kind === kind ? [...pieces.slice(0, -1), { kind, text: last.text + text }] : [...pieces, { kind, text }];
}

// Generate the answer `id`, the last item.
async function stream(id) {
  const controller = new AbortController();
  running = { id, controller };
  const { temperature, top_k } = state.settings;
  const body = JSON.stringify({ messages: messages(state.items).slice(0, -1), temperature, top_k });
  announce("Generating an answer");
  requestRender();
  let end = { status: "failed", error: "The answer was interrupted: the connection was closed." };
  try {
    const response = await call("/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: controller.signal });
    if (!response.ok) throw await refused(response);
    if ($("model").className !== "up") connect();
    for await (const event of events(response)) {
      if (event.error) throw new Failure(`The answer was interrupted: ${event.error.message}.`);
      if (event.done) {
        end = { status: "done", remark: event.finish_reason === "length" ? "Stopped at the length limit." : "" };
        break;
      }
      patch(id, (item) => ({ pieces: appended(item.pieces, event.kind ?? "text", event.token) }));
    }
  } catch (error) {
    if (controller.signal.aborted) end = { status: "stopped", remark: "Stopped." };
    else if (error instanceof Failure) end = { status: "failed", error: error.message };
    else if (error instanceof TypeError) end.error = "The answer was interrupted: the connection was lost.";
    else end.error = `Could not read the answer: ${error.message}`;
  }
  patch(id, () => end);
  if (running?.id === id) running = null;
  const item = state.items.find((item) => item.id === id);
  if (item) announce(`${plain(item)} ${end.error || end.remark || ""}`.trim());
  if (end.status === "failed") connect();
  save();
}

function stop() {
  running?.controller.abort();
  running = null;
}

// The status line at the top: is the server up, and which model does it serve?
let retrying = 0;
async function connect() {
  clearTimeout(retrying);
  let shown;
  try {
    const response = await call("/stats");
    if (!response.ok) throw await refused(response);
    shown = describe(await response.json());
  } catch (error) {
    const token = error.cause === "token"; // was not entered: do not ask again every few seconds
    shown = { look: "down", text: token ? "token required" : "offline", later: token ? 0 : 3000 };
  }
  if (shown.later) retrying = setTimeout(connect, shown.later);
  const [node, label] = [$("model"), $("model").lastElementChild];
  node.className = shown.look;
  node.title = shown.text;
  if (label.textContent !== shown.text) label.textContent = shown.text;
}

function describe(stats) {
  if (!stats.workers.some((worker) => worker.ready)) {
    const error = stats.workers.find((worker) => worker.error)?.error;
    return { look: "", text: error ? `not ready: ${error}` : "loading the model…", later: 1000 };
  }
  const { name, step, stage } = stats.model;
  const parts = [name, stage, Number.isFinite(step) ? `step ${number(step)}` : ""].filter(Boolean);
  $("notice").hidden = !stats.notice;
  $("about").hidden = Boolean(stats.notice); // a base model can do less than that says
  $("notice").lastElementChild.textContent = stats.notice ?? "";
  return { look: "up", text: parts.join(" · "), later: 0 };
}

// ---- Actions of the user ---------------------------------------------------------------------------------------
function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function note(text, wrong = false) {
  change({ items: [...state.items, withId({ role: "note", text, wrong })] });
  announce(text.replaceAll("`", ""));
  toEnd();
  save();
}

// Replace the items from `index` on by these and generate an answer. Undo brings back what was removed.
function continueFrom(index, added, undoText) {
  const dropped = state.items.length - index;
  stop();
  offerUndo(dropped && undoText);
  const answer = pending();
  change({ items: [...state.items.slice(0, index), ...added, answer], editing: null });
  toEnd();
  save();
  stream(answer.id);
}

function submit() {
  const text = tidy($("text").value);
  if (!text || running) return;
  if (text.startsWith("/")) {
    if (command(text)) clearText();
    return;
  }
  const reason = refusal(text, state.items);
  problem(reason);
  if (reason) return;
  clearText();
  continueFrom(state.items.length, [withId({ role: "user", text })], "");
}

function clearText() {
  $("text").value = "";
  problem("");
  typed();
}

function regenerate(id) {
  const index = state.items.findIndex((item) => item.id === id);
  if (index < 0) return;
  const failed = state.items[index].status === "failed" && index === state.items.length - 1;
  continueFrom(index, [], failed ? "" : "Regenerating the answer.");
  $("text").focus({ preventScroll: true });
}

function edit(id) {
  change({ editing: id });
  render();
  document.querySelector(".editor textarea")?.focus();
}

function newChat() {
  stop();
  offerUndo(state.items.length && "Conversation cleared.");
  change({ items: [], editing: null });
  clearText();
  announce("New chat");
  $("text").focus();
  save();
}

let fading = 0;
function offerUndo(text) {
  clearTimeout(fading);
  before = text ? state.items.map((item) => (item.status === "streaming" ? { ...item, status: "stopped", remark: "Stopped." } : item)) : null;
  $("toast").hidden = !text;
  if (!text) return;
  $("toast").firstElementChild.textContent = text;
  const fade = () => { // not while the keyboard or the pointer is on it
    if ($("toast").matches(":hover, :focus-within")) fading = setTimeout(fade, 2000);
    else $("toast").hidden = true;
  };
  fading = setTimeout(fade, 8000);
}

function undo() {
  stop();
  change({ items: before ?? state.items, editing: null });
  offerUndo("");
  $("text").focus();
  save();
}

const COMMANDS = {
  "/temperature": { usage: "/temperature x", about: () => `sampling temperature, higher is more random; now ${state.settings.temperature}`, run: (value) => set("temperature", value, false) },
  "/topk": { usage: "/topk k", about: () => `sample from the k most likely tokens, 0 for all; now ${state.settings.top_k}`, run: (value) => set("top_k", value, true) },
  "/clear": { usage: "/clear", about: () => "start a new chat", run: newChat },
  "/help": { usage: "/help", about: () => "show commands and keys", run: help },
};

function set(name, value, whole) {
  const label = name === "top_k" ? "top-k" : name;
  const [low, high] = LIMITS[name];
  if (!value) return note(`${label} is ${state.settings[name]}; it can be ${low} to ${high}.`);
  const wanted = /^[+-]?(\d+\.?\d*|\.\d+)$/.test(value) ? Number(value) : NaN;
  if (!(wanted >= low && wanted <= high) || (whole && !Number.isInteger(wanted))) {
    return note(`${label} must be a ${whole ? "whole " : ""}number from ${low} to ${high}, not \`${value}\`. It stays at ${state.settings[name]}.`, true);
  }
  change({ settings: { ...state.settings, [name]: wanted } });
  note(`${label} is now ${wanted}.`);
}

function help() {
  const commands = Object.values(COMMANDS).map(({ usage, about }) => `- \`${usage}\` ${about()}`);
  const keys = [
    "- `Enter` sends, `Shift+Enter` starts a new line, `Escape` stops the answer",
    "- `Ctrl+Shift+N` starts a new chat, unless the browser reserves it",
    "- `Up` in an empty box edits your last message; click any message to edit it, or an answer to regenerate it",
  ];
  note([...commands, ...keys].join("\n"));
}

// Run a command; false if it is unknown: the text then stays in the box.
function command(text) {
  const [name, ...values] = text.split(/\s+/);
  const known = Object.hasOwn(COMMANDS, name) && COMMANDS[name];
  if (!known) {
    problem(`Unknown command ${name}. Commands: ${Object.keys(COMMANDS).join(", ")}. To send it as a message, put a space before the slash.`);
    return false;
  }
  problem("");
  known.run(values.join(" "));
  return true;
}

// ---- Answers: a small part of Markdown, as nodes -------------------------------------------------------------------------
// Pieces become one text, in which TOOL stands for each tool call, and the list of the calls.
function compile(pieces) {
  const tools = [];
  let text = "";
  for (const piece of pieces) {
    if (piece.kind === "text") text += piece.text.replaceAll(TOOL, "\uFFFD");
    else if (piece.kind === "output" && tools.length && tools.at(-1).output === null) tools[tools.length - 1] = { ...tools.at(-1), output: piece.text };
    else {
      tools.push(piece.kind === "python" ? { call: piece.text, output: null } : { call: "", output: piece.text });
      text += TOOL;
    }
  }
  return { text, tools };
}

const toolText = ({ call, output }) => `calculator: ${call}${output === null ? "" : ` = ${output}`}`;

// An answer as plain text, for copying and for reading aloud.
function plain(item) {
  const { text, tools } = compile(item.pieces);
  let next = 0;
  return text.replaceAll(TOOL, () => `[${toolText(tools[next++])}]`);
}

// Split a text into blocks: {kind: "code", language, text} | {kind: "list", rows: [{deep, number, text}]} | {kind: "head" | "text", text}
function blocks(text) {
  const parsed = [];
  const lines = text.split("\n");
  const row = (line) => /^(\s*)(?:[-*•]|(\d{1,9})[.)])\s+(\S.*)$/.exec(line);
  const fence = (line) => /^\s*```\s*([\w+#.-]*)\s*$/.exec(line);
  const head = (line) => /^#{1,6}\s+(\S.*)$/.exec(line);
  for (let i = 0; i < lines.length; ) {
    const [opened, titled, listed] = [fence(lines[i]), head(lines[i]), row(lines[i])];
    if (opened) {
      const start = ++i;
      while (i < lines.length && !/^\s*```\s*$/.test(lines[i])) i++;
      parsed.push({ kind: "code", language: opened[1], text: lines.slice(start, i++).join("\n") });
    } else if (titled) {
      parsed.push({ kind: "head", text: titled[1] });
      i++;
    } else if (listed) {
      const rows = [];
      for (let match; i < lines.length && (match = row(lines[i])); i++) rows.push({ deep: match[1].length > 1, number: match[2] ?? "", text: match[3] });
      parsed.push({ kind: "list", rows });
    } else {
      const start = i;
      while (i < lines.length && lines[i].trim() && !fence(lines[i]) && !head(lines[i]) && !row(lines[i])) i++;
      if (i > start) parsed.push({ kind: "text", text: lines.slice(start, i).join("\n") });
      else i++;
    }
  }
  return parsed;
}

function toolNode(tool) {
  const node = h("span", { class: "tool" }, icon("tool"), h("span", { class: "name" }, "calculator"), h("span", { class: "hide" }, ": "), h("span", { class: "call" }, tool.call));
  if (tool.output !== null) node.append("=", h("span", { class: "result" }, tool.output));
  return node;
}

// Text with its tool calls; `take` returns the next of them.
function put(parent, text, take) {
  text.split(TOOL).forEach((part, i) => {
    if (i) parent.append(toolNode(take()));
    if (part) parent.append(part);
  });
  return parent;
}

function inline(parent, text, take) {
  let end = 0;
  for (const match of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*/g)) {
    put(parent, text.slice(end, match.index), take);
    parent.append(put(h(match[1] ? "code" : "strong"), match[1] ?? match[2], take));
    end = match.index + match[0].length;
  }
  return put(parent, text.slice(end), take);
}

function blockNode(block, take) {
  if (block.kind === "code") {
    const button = iconButton("copy", "Copy code", () => copy(code.textContent, button));
    const code = put(h("code"), block.text, take);
    return h("div", { class: "code" }, h("div", {}, h("span", {}, block.language || "text"), button), h("pre", { tabindex: "0" }, code));
  }
  if (block.kind === "list") {
    const rows = block.rows.map(({ deep, number, text }) => {
      const node = inline(h("li", { class: deep && "deep" }), text, take);
      if (number) node.value = Number(number);
      return node;
    });
    return h(block.rows[0].number ? "ol" : "ul", {}, ...rows);
  }
  return inline(h(block.kind === "head" ? "h3" : "p"), block.text, take);
}

// Render these pieces into `body`. Unchanged blocks stay, and so does a selection in them.
function paintBody(body, pieces) {
  const { text, tools } = compile(pieces);
  let used = 0;
  const wanted = blocks(text).map((block) => {
    const mine = tools.slice(used, (used += JSON.stringify(block).split(TOOL).length - 1));
    return { block, mine, key: JSON.stringify([block, mine]) };
  });
  wanted.forEach(({ block, mine, key }, i) => {
    const old = body.children[i];
    if (old?.dataset.key === key) return;
    const queue = [...mine];
    const node = blockNode(block, () => queue.shift());
    node.dataset.key = key;
    if (old) old.replaceWith(node);
    else body.append(node);
  });
  while (body.children.length > wanted.length) body.lastElementChild.remove();
}

// ---- Rendering ---------------------------------------------------------------------------------------------------------
// A plain click: not one that selects text, ends a selection, or hits a control.
let selecting = false;
document.addEventListener("pointerdown", () => { selecting = !getSelection().isCollapsed; });
function onPlainClick(act) {
  let timer = 0;
  return (event) => {
    clearTimeout(timer);
    if (event.detail > 1 || selecting || event.target.closest("button, .code, .tool")) return;
    timer = setTimeout(() => { if (getSelection().isCollapsed) act(); }, 250); // a second click selects a word
  };
}

function editor(item) {
  const index = () => state.items.findIndex((other) => other.id === item.id);
  const area = h("textarea", { rows: "1", "aria-label": "Edit message" });
  const wrong = h("div", { class: "problem", role: "alert", hidden: true });
  const cancel = () => {
    change({ editing: null });
    render();
    views.get(item.id)?.node.querySelector("button")?.focus();
  };
  const accept = (event) => {
    event?.preventDefault();
    const text = tidy(area.value);
    if (!text) return;
    wrong.textContent = refusal(text, state.items.slice(0, index()));
    wrong.hidden = !wrong.textContent;
    if (wrong.textContent) return;
    continueFrom(index(), [withId({ role: "user", text })], "Message edited.");
    $("text").focus({ preventScroll: true });
  };
  area.value = item.text;
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) accept(event);
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
  });
  requestAnimationFrame(() => grow(area));
  return h("form", { class: "editor", submit: accept }, area,
    h("div", { class: "row" }, h("span", { class: "count" }, "Replaces everything after it"), h("button", { class: "plain", type: "button", click: cancel }, "Cancel"), h("button", { class: "plain strong", type: "submit" }, "Send")), wrong);
}

function paintUser(node, item, editing) {
  if (editing) return node.replaceChildren(editor(item));
  node.replaceChildren(
    h("span", { class: "hide" }, "You: "),
    h("div", { class: "bubble", click: onPlainClick(() => edit(item.id)) }, item.text),
    h("div", { class: "actions" }, iconButton("edit", "Edit message", () => edit(item.id))),
  );
}

function paintAnswer(node, item) {
  if (!node.firstChild) {
    const button = iconButton("copy", "Copy answer", () => copy(plain(views.get(item.id).item), button));
    const act = () => { if (views.get(item.id).item.status !== "streaming") regenerate(item.id); };
    node.append(h("span", { class: "hide" }, "nanochat: "), h("div", { class: "body", click: onPlainClick(act) }), h("div", { class: "end" }),
      h("div", { class: "actions" }, button, iconButton("again", "Regenerate answer", () => regenerate(item.id))));
  }
  const [, body, end] = node.children;
  const streaming = item.status === "streaming";
  paintBody(body, item.pieces);
  if (streaming && !body.firstChild) body.append(h("span", { class: "dots", role: "img", "aria-label": "Thinking" }, h("i"), h("i"), h("i")));
  for (const child of body.children) child.classList.toggle("caret", streaming && child === body.lastElementChild && ["P", "H3"].includes(child.tagName));
  const parts = [];
  if (item.error) parts.push(h("div", { class: "error" }, icon("alert"), h("span", {}, item.error), h("button", { class: "plain", type: "button", click: () => regenerate(item.id) }, icon("again"), "Retry")));
  const remark = item.remark || (item.status === "done" && !item.pieces.length ? "The answer is empty." : "");
  if (remark) parts.push(h("p", { class: "remark" }, remark));
  end.replaceChildren(...parts);
}

const views = new Map(); // id → {node, item, editing, out}
function view(item, out) {
  const editing = state.editing === item.id;
  const old = views.get(item.id);
  if (old && old.item === item && old.editing === editing && old.out === out) return old.node;
  const node = old?.node ?? h("article");
  views.set(item.id, { node, item, editing, out });
  const role = { user: "user", assistant: `answer ${item.status === "streaming" ? "streaming" : "done"}`, note: "note" }[item.role];
  node.className = `${role}${editing ? " editing" : ""}${item.wrong ? " wrong" : ""}${out ? " unanswered" : ""}`;
  node.title = out ? "Not sent to the model: it has no answer" : "";
  if (item.role === "user") paintUser(node, item, editing);
  else if (item.role === "assistant") paintAnswer(node, item);
  else if (!old) {
    node.append(h("div", { class: "body" }));
    paintBody(node.firstChild, [{ kind: "text", text: item.text }]);
  }
  return node;
}

let frame = 0;
function requestRender() {
  frame ||= requestAnimationFrame(render);
}

function render() {
  cancelAnimationFrame(frame);
  frame = 0;
  const log = $("log");
  const out = unanswered(state.items);
  const ids = new Set(state.items.map((item) => item.id));
  for (const [id, { node }] of views) if (!ids.has(id)) { node.remove(); views.delete(id); }
  state.items.forEach((item, i) => {
    const node = view(item, out.has(item.id));
    if (log.children[i] !== node) log.insertBefore(node, log.children[i] ?? null);
  });
  log.hidden = !state.items.length;
  $("empty").hidden = !log.hidden;
  const { temperature, top_k } = state.settings;
  $("settings").textContent = `temperature ${temperature} · top-k ${top_k || "off"}`;
  sendButton();
  follow();
  scrolled();
}

function sendButton() {
  const name = running ? "stop" : "send";
  $("send").disabled = !running && !$("text").value.trim();
  if ($("send").dataset.name === name) return;
  $("send").dataset.name = name;
  $("send").setAttribute("aria-label", running ? "Stop" : "Send");
  $("send").title = running ? "Stop (Escape)" : "Send (Enter)";
  $("send").replaceChildren(icon(name));
}

// ---- Scrolling: follow the answer until the user scrolls up ----------------------------------------------------------------
let sticking = true;
let lastTop = 0;
function follow() {
  if (sticking) $("scroll").scrollTop = state.items.length ? $("scroll").scrollHeight : 0;
}

function scrolled() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  const left = scrollHeight - clientHeight - scrollTop;
  if (scrollTop < lastTop - 1) sticking = false;
  if (left < 24) sticking = true;
  lastTop = scrollTop;
  $("bottom").hidden = left < 160 || !state.items.length;
}

function toEnd() {
  sticking = true;
  requestRender();
}

// ---- The message box -----------------------------------------------------------------------------------------------------
const composing = (event) => event.isComposing || event.keyCode === 229; // an input method's Enter picks a word

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function typed() {
  const text = $("text").value;
  const n = length(text);
  grow($("text"));
  $("count").textContent = n > 0.75 * LIMITS.message ? `${number(n)} / ${number(LIMITS.message)}` : "";
  $("count").classList.toggle("over", n > LIMITS.message);
  const fitting = /^\/\S*$/.test(text) ? Object.keys(COMMANDS).filter((name) => name.startsWith(text)) : [];
  $("menu").hidden = !fitting.length;
  $("menu").replaceChildren(...fitting.map((name) => h("li", {}, h("button", { type: "button", click: () => complete(name) }, h("code", {}, COMMANDS[name].usage), h("span", {}, COMMANDS[name].about())))));
  sendButton();
}

function complete(name) {
  $("text").value = COMMANDS[name].usage === name ? name : `${name} `;
  problem("");
  typed();
  $("menu").hidden = true;
  $("text").focus();
}

function keyInBox(event) {
  if (composing(event)) return;
  const choices = $("menu").hidden ? [] : [...$("menu").querySelectorAll("code")];
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "Tab" && !event.shiftKey && choices.length) {
    event.preventDefault();
    complete(choices[0].textContent.split(" ")[0]);
  } else if (event.key === "ArrowUp" && !$("text").value) {
    const last = state.items.findLast((item) => item.role === "user");
    if (last) { event.preventDefault(); edit(last.id); }
  } else if (event.key === "Escape" && choices.length) {
    event.stopPropagation();
    $("menu").hidden = true;
  }
}

// ---- Start -----------------------------------------------------------------------------------------------------------------
function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stop();
    else submit();
    $("text").focus({ preventScroll: true });
  });
  $("text").addEventListener("keydown", keyInBox);
  $("text").addEventListener("input", () => { problem(""); typed(); });
  $("settings").addEventListener("click", () => { if (!$("text").value) { $("text").value = "/"; typed(); } $("text").focus(); });
  $("new").addEventListener("click", newChat);
  $("undo").addEventListener("click", undo);
  $("theme").addEventListener("click", switchTheme);
  $("bottom").addEventListener("click", () => { sticking = true; $("scroll").scrollTo({ top: $("scroll").scrollHeight, behavior: "smooth" }); $("text").focus({ preventScroll: true }); });
  $("scroll").addEventListener("scroll", scrolled, { passive: true });
  $("ask-cancel").addEventListener("click", () => $("ask").close());
  $("ask").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    store("nanochat.token", token);
    $("ask").close("given");
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey && event.shiftKey && event.code === "KeyN") { event.preventDefault(); newChat(); }
    else if (event.key === "Escape" && running && !$("ask").open) stop();
  });
  addEventListener("pagehide", save);
  new ResizeObserver(() => { follow(); scrolled(); }).observe($("scroll"));
  // A phone's keyboard makes the visual viewport smaller, and on some not the layout's.
  visualViewport?.addEventListener("resize", () => { if (visualViewport.scale === 1) document.documentElement.style.setProperty("--height", `${visualViewport.height}px`); });
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme(theme) {
  document.documentElement.style.colorScheme = theme ?? "";
  const color = getComputedStyle(document.body).backgroundColor;
  for (const meta of document.querySelectorAll("meta[name=theme-color]")) meta.content = color;
}

function switchTheme() {
  const system = dark.matches ? "dark" : "light";
  const now = document.documentElement.style.colorScheme || system;
  const next = now === "dark" ? "light" : "dark";
  try {
    if (next === system) localStorage.removeItem("nanochat.theme");
    else localStorage.setItem("nanochat.theme", next);
  } catch { /* switched off: it holds for this page */ }
  applyTheme(next === system ? null : next);
}

function start() {
  let theme = null;
  try { theme = localStorage.getItem("nanochat.theme"); } catch { /* as above */ }
  applyTheme(["light", "dark"].includes(theme) ? theme : null);
  $("ideas").append(...IDEAS.map(([name, text]) => h("li", {}, h("button", { type: "button", click: () => { $("text").value = text; submit(); $("text").focus({ preventScroll: true }); } }, h("small", {}, name), h("span", {}, text)))));
  listen();
  restore();
  render();
  typed();
  if (matchMedia("(hover: hover)").matches) $("text").focus();
  connect();
}

start();
