// The page: its state, what the user can do, and how that is drawn.
import * as api from "./api.js";
import { $, announce, count, download, h, icon, number } from "./dom.js";
import { announceAnswer, composing, drawMessages, grow, useActions } from "./messages.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import * as transfer from "./transfer.js";
import { add, appended, before, choose, create, merge, messages, patch, path, title } from "./tree.js";

const IDEAS = [
  ["Arithmetic", "What is 348 + 1,279?"],
  ["Spelling", "How many r are in strawberry?"],
  ["A fact", "What is the capital of France?"],
  ["A short text", "Write two sentences about the sea."],
];
const SAVE_SECONDS = 1; // between two writes of an answer in progress, which also show other tabs that it is alive

// ---- State: one value, replaced and never changed -------------------------------------------------------------------
let state = { conversations: {}, open: null, editing: null, inspected: null };
const running = new Map(); // id of an answer in progress in this tab → {conversation: id, controller}
const tokens = new Map(); // id of an answer → its token probabilities
let drafts = store.tab.get("drafts") ?? {}; // of the message box: id of a conversation, "" for a new one → text

let [isReachable, isKept] = [true, true];

const current = () => state.conversations[state.open];
const streamingHere = () => [...running].find(([, { conversation }]) => conversation === state.open);

function change(changes) {
  state = { ...state, ...changes };
  requestRender();
}

function setConversation(conversation) {
  change({ conversations: { ...state.conversations, [conversation.id]: conversation } });
}

async function save(id) {
  const kept = await store.put(state.conversations[id]);
  if (!kept) isKept = false;
  warn();
}

function update(id, next) {
  setConversation(next);
  save(id);
}

function warn() {
  const text = [
    isReachable ? "" : "The server cannot be reached; trying again every few seconds. Conversations and what you type stay here.",
    isKept ? "" : "This browser does not keep conversations: export them before you close the page.",
  ].filter(Boolean).join(" ");
  if ($("offline").textContent !== text) $("offline").textContent = text;
  $("offline").hidden = !text;
}

// An answer that nobody writes any more: its tab was closed or reloaded.
function settle(id) {
  const conversation = state.conversations[id];
  const open = Object.values(conversation?.nodes ?? {}).filter((node) => node.status === "streaming" && !running.has(node.id));
  if (!open.length) return;
  const own = store.tab.get("running") ?? [];
  const isDead = (node) => own.includes(node.id) || Date.now() - conversation.updated > 5000 * SAVE_SECONDS;
  const dead = open.filter(isDead);
  if (dead.length) update(id, dead.reduce((made, node) => patch(made, node.id, { status: "stopped", remark: "Stopped: the page was closed." }), conversation));
  if (dead.length < open.length) setTimeout(() => settle(id), 3000 * SAVE_SECONDS);
}

// ---- Answers ----------------------------------------------------------------------------------------------------------
const length = (text) => { let n = 0; for (const _ of text) n++; return n; }; // characters as the server counts them
const size = (turn) => (typeof turn.content === "string" ? length(turn.content) : turn.content.reduce((sum, part) => sum + length(part.text), 0));
// Without empty lines around it and without unpaired surrogates.
const tidy = (text) => text.replace(/^\s*\n/, "").trimEnd().toWellFormed();

// Why the server would reject this text after these messages; "" if it would not.
function refusal(text, nodes) {
  const limits = settings.limits();
  if (!limits) return "";
  if (length(text) > limits.message) return `This message has ${number(length(text))} characters; the limit is ${number(limits.message)}.`;
  const turns = messages(nodes);
  const total = turns.reduce((sum, turn) => sum + size(turn), length(text));
  const long = turns.find((turn) => size(turn) > limits.message);
  if (long) return `An earlier answer has ${number(size(long))} characters; the limit is ${number(limits.message)} per message. Start a new chat, or edit an earlier message.`;
  if (total > limits.total) return `With this message the conversation has ${number(total)} characters; the limit is ${number(limits.total)}. Start a new chat, or edit an earlier message.`;
  if (turns.length + 1 > limits.messages) return `The conversation has reached its limit of ${number(limits.messages)} messages. Start a new chat.`;
  return "";
}

// Generate an answer to the message `parent`: a further version, or in the place of `empty`, which has no text.
function generate(conversation, parent, empty = null) {
  const request = { ...settings.sampling(), system: settings.systemPrompt() };
  const values = { role: "assistant", pieces: [], status: "streaming", remark: "", error: "", vote: 0, request };
  const next = empty ? patch(conversation, empty.id, values) : add(conversation, parent, values)[0];
  const node = next.nodes[next.chosen[parent]];
  change({ editing: null, inspected: null });
  update(next.id, next);
  toEnd();
  stream(next.id, node);
}

async function stream(id, { id: answer, parent, request }) {
  const controller = new AbortController();
  running.set(answer, { conversation: id, controller });
  store.tab.set("running", [...running.keys()]);
  const beat = setInterval(() => { if (state.conversations[id]) update(id, { ...state.conversations[id], updated: Date.now() }); }, 1000 * SAVE_SECONDS);
  const own = (values) => setConversation(patch(state.conversations[id], answer, values));
  const { system, ...sampled } = request;
  const sent = messages([...before(state.conversations[id], parent), state.conversations[id].nodes[parent]]);
  announce("Generating an answer");
  let end = { status: "failed", error: "" };
  let [first, last, seen] = [0, 0, []];
  try {
    for await (const { pieces, tokens: more, finish, usage } of api.answer({ messages: [...(system ? [{ role: "system", content: system }] : []), ...sent], ...sampled }, controller.signal)) {
      if (pieces.length) [first, last] = [first || performance.now(), performance.now()];
      seen.push(...more);
      if (pieces.length) own({ pieces: pieces.reduce((made, { kind, text }) => appended(made, kind, text), state.conversations[id].nodes[answer].pieces) });
      if (finish) end = { status: "done", remark: finish === "length" ? "Stopped at the length limit." : "" };
      if (usage) end.speed = { tokens: usage.completion_tokens, seconds: (last - first) / 1000 };
    }
  } catch (error) {
    if (controller.signal.aborted) end = { status: "stopped", remark: "Stopped." };
    else if (end.status === "failed") end.error = failureText(error);
  }
  clearInterval(beat);
  running.delete(answer);
  store.tab.set("running", [...running.keys()]);
  if (seen.length) keepTokens(answer, seen);
  if (!state.conversations[id]) return; // deleted meanwhile
  own({ ...end, hasTokens: seen.length > 0 });
  if (id === state.open) announceAnswer(state.conversations[id].nodes[answer]);
  if (end.status === "failed" || connection !== "up") connect();
  save(id);
}

function failureText(error) {
  if (error instanceof api.Failure) return error.message;
  if (error instanceof TypeError) return "The answer was interrupted: the connection was lost.";
  return `Could not read the answer: ${error.message}`;
}

function keepTokens(id, list) {
  tokens.set(id, list);
  store.putTokens(id, list);
}

function stop() {
  const here = streamingHere();
  here?.[1].controller.abort();
  return Boolean(here);
}

// ---- What the user can do -----------------------------------------------------------------------------------------------
function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function submit() {
  if (!settings.limits()) await loadSettings().catch(() => {}); // offline: the request will say so
  const text = tidy($("text").value);
  if (text.startsWith("/")) {
    if (command(text)) clearText();
    return;
  }
  if (!text || streamingHere()) return;
  const conversation = current() ?? create();
  const nodes = path(conversation);
  const reason = nodes.at(-1)?.status === "streaming" ? "Another tab is writing this answer: wait for its end." : refusal(text, nodes);
  problem(reason);
  if (reason) return;
  clearText();
  const [next, node] = add(conversation, nodes.at(-1)?.id ?? "", { role: "user", text });
  setConversation(next);
  if (!state.open) show(next.id, "replace");
  generate(next, node.id);
}

async function loadSettings() {
  await settings.load();
  typed(); // what is in the box may be too long
}

function clearText() {
  $("text").value = "";
  problem("");
  typed();
}

useActions({
  edit: (node) => { change({ editing: node.id }); render(); },
  cancel: () => { change({ editing: null }); render(); },
  // Another version of a message; returns why it cannot be sent, or "".
  send(node, given) {
    const text = tidy(given);
    const reason = text ? refusal(text, before(current(), node.id)) : "The message is empty.";
    if (reason) return reason;
    stop();
    const [next, version] = add(current(), node.parent, { role: "user", text });
    generate(next, version.id);
    $("text").focus({ preventScroll: true });
    return "";
  },
  regenerate(node) {
    stop();
    generate(current(), node.parent, node.pieces.some(({ text }) => text) ? null : node);
    $("text").focus({ preventScroll: true });
  },
  choose(node) {
    update(state.open, choose(current(), node));
    change({ editing: null, inspected: null });
    render();
  },
  vote(node, value) {
    update(state.open, patch(current(), node.id, { vote: value }));
    announce(value ? "Thank you: the thumb goes along with an export." : "Thumb removed");
    render();
  },
  async tokens(node) {
    if (state.inspected?.id === node.id) return change({ inspected: null });
    const list = tokens.get(node.id) ?? (await store.getTokens(node.id));
    if (list?.length) change({ inspected: { id: node.id, tokens: list } });
    else tell("The token probabilities of this answer were not kept.");
  },
});

// ---- Conversations ----------------------------------------------------------------------------------------------------------
// Open a conversation, null for a new one; `how`: "push" or "replace" the address, or leave it.
function show(id, how) {
  id = state.conversations[id] ? id : null;
  if (how) history[`${how}State`](null, "", id ? `#${id}` : location.pathname);
  change({ open: id, editing: null, inspected: null });
  $("text").value = drafts[id ?? ""] ?? "";
  problem("");
  typed();
  toEnd();
  if (id) settle(id);
  if (narrow.matches) setSide(false);
}

function newChat() {
  show(null, "push");
  announce("New chat");
  $("text").focus();
}

function deleteConversation(id) {
  const conversation = state.conversations[id];
  for (const { conversation: other, controller } of running.values()) if (other === id) controller.abort();
  forget(id);
  store.remove(id);
  tell(`Deleted “${title(conversation)}”.`, () => { update(id, conversation); show(id, "push"); });
}

function exportFile(conversations, name) {
  const { text, count: n, skipped } = transfer.exported(conversations);
  if (!n) return tell("There is no conversation with an answer to export.");
  download(name, text);
  tell(`Exported ${count(n, "conversation")}${skipped ? `, ${number(skipped)} without an answer skipped` : ""}. Fine-tune on them with customjson:${name}`);
}

function exportPairs() {
  const { text, count: n } = transfer.pairs(Object.values(state.conversations));
  if (!n) return tell("There are no pairs yet: regenerate an answer, and give one version a thumb up or down.");
  download("nanochat_pairs.jsonl", text);
  tell(`Exported ${count(n, "preference pair")}.`);
}

async function importFile(file) {
  try {
    const made = transfer.imported(await file.text());
    made.forEach((conversation) => update(conversation.id, merge(state.conversations[conversation.id], conversation)));
    tell(`Imported ${count(made.length, "conversation")}.`);
    show(made[0].id, "push");
  } catch (error) {
    tell(`Could not import ${file.name}: ${error.message}.`);
  }
}

// ---- A short message over the box, with Undo if there is something to undo ----------------------------------------------------
let fading = 0;
let undo = null;
function tell(text, undoing = null) {
  clearTimeout(fading);
  undo = undoing;
  $("toast").firstElementChild.textContent = text;
  $("undo").hidden = !undo;
  $("toast").hidden = !text;
  const fade = () => { // not while the keyboard or the pointer is on it
    if ($("toast").matches(":hover, :focus-within")) fading = setTimeout(fade, 2000);
    else $("toast").hidden = true;
  };
  fading = setTimeout(fade, 8000);
}

// ---- Commands -------------------------------------------------------------------------------------------------------------------
const COMMANDS = {
  "/temperature": { usage: "/temperature x", about: "sampling temperature, higher is more random", run: (value) => setByCommand("temperature", value) },
  "/topk": { usage: "/topk k", about: "sample from the k most likely tokens, 0 for all", run: (value) => setByCommand("top_k", value) },
  "/clear": { usage: "/clear", about: "start a new chat", run: newChat },
  "/help": { usage: "/help", about: "show keys and commands", run: () => $("help").showModal() },
};

function setByCommand(name, text) {
  const [label, wrong] = [name === "top_k" ? "top-k" : name, settings.objection(name, text)];
  if (wrong) return problem(`${label} must be ${wrong}${text && `, not ${text}`}.`), false;
  settings.set(name, Number(text));
  tell(`${label} is now ${Number(text)}.`);
}

// Run a command; false if it is unknown or wrong: the text then stays in the box.
function command(text) {
  const [name, ...values] = text.split(/\s+/);
  const known = Object.hasOwn(COMMANDS, name) && COMMANDS[name];
  problem(known ? "" : `Unknown command ${name}. Commands: ${Object.keys(COMMANDS).join(", ")}. To send it as a message, put a space before the slash.`);
  return known && known.run(values.join(" ")) !== false;
}

// ---- The message box -----------------------------------------------------------------------------------------------------
function typed() {
  const text = $("text").value;
  const [n, limit] = [length(text), settings.limits()?.message ?? Infinity];
  drafts = { ...drafts, [state.open ?? ""]: text };
  if (!text) delete drafts[state.open ?? ""];
  store.tab.set("drafts", drafts);
  grow($("text"));
  $("count").textContent = n > 0.75 * limit ? `${number(n)} / ${number(limit)}` : "";
  $("count").classList.toggle("over", n > limit);
  const fitting = /^\/\S*$/.test(text) ? Object.keys(COMMANDS).filter((name) => name.startsWith(text)) : [];
  $("menu").hidden = !fitting.length;
  $("menu").replaceChildren(...fitting.map((name) => h("li", {}, h("button", { type: "button", click: () => complete(name) }, h("code", {}, COMMANDS[name].usage), h("span", {}, COMMANDS[name].about)))));
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
    const last = path(current()).findLast((node) => node.role === "user");
    if (last) { event.preventDefault(); change({ editing: last.id }); render(); }
  } else if (event.key === "Escape" && choices.length) {
    event.stopPropagation();
    $("menu").hidden = true;
  }
}

function sendButton() {
  const name = streamingHere() ? "stop" : "send";
  $("send").disabled = name === "send" && !$("text").value.trim();
  if ($("send").dataset.name === name) return;
  $("send").dataset.name = name;
  $("send").setAttribute("aria-label", name === "stop" ? "Stop" : "Send");
  $("send").title = name === "stop" ? "Stop (Escape)" : "Send (Enter)";
  $("send").replaceChildren(icon(name));
}

// ---- Drawing ---------------------------------------------------------------------------------------------------------------
let frame = 0;
function requestRender() {
  frame ||= requestAnimationFrame(render);
}

function render() {
  cancelAnimationFrame(frame);
  frame = 0;
  const conversation = current();
  drawMessages(conversation, state.editing, state.inspected);
  sidebar.drawList(state.conversations, state.open);
  $("settings").textContent = settings.summary();
  document.title = conversation ? `${title(conversation)} · nanochat` : "nanochat";
  sendButton();
  follow();
  scrolled();
}

// ---- Scrolling: follow the answer until the user scrolls up ----------------------------------------------------------------
let sticking = true;
let lastTop = 0;
function follow() {
  if (sticking) $("scroll").scrollTop = current() ? $("scroll").scrollHeight : 0;
}

function scrolled() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  const left = scrollHeight - clientHeight - scrollTop;
  if (scrollTop < lastTop - 1) sticking = false;
  if (left < 24) sticking = true;
  lastTop = scrollTop;
  $("bottom").hidden = left < 160 || !current();
}

function toEnd() {
  sticking = true;
  requestRender();
}

// ---- The status line at the top: is the server up, and which model does it serve? ---------------------------------------------
let retrying = 0;
let connection = ""; // "up", "down", or "" while the model loads
let described = null; // the name of the model that the line shows
async function connect() {
  clearTimeout(retrying);
  let shown;
  try {
    const stats = await api.getJson("/stats");
    if (!settings.limits() || (connection !== "up" && stats.model)) await loadSettings();
    shown = describe(stats);
  } catch (error) {
    const token = error.cause === "token"; // was not entered: do not ask again every few seconds
    shown = { look: "down", text: token ? "token required" : "offline", later: token ? 0 : 3000, offline: !token };
  }
  if (shown.later) retrying = setTimeout(connect, shown.later);
  isReachable = !shown.offline;
  warn();
  connection = shown.look;
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
  described = settings.model();
  const { name, step, stage, notice } = stats.models.find((model) => model.name === described) ?? stats.models[0];
  const parts = [name, stage, Number.isFinite(step) ? `step ${number(step)}` : ""].filter(Boolean);
  $("notice").hidden = !notice;
  $("about").hidden = Boolean(notice); // a base model can do less than that says
  $("notice").lastElementChild.textContent = notice ?? "";
  return { look: "up", text: parts.join(" · "), later: 0 };
}

// ---- The two sides of the page: over it where it is narrow --------------------------------------------------------------------
const narrow = matchMedia("(max-width: 56rem)");

function setSide(open) {
  document.body.classList.toggle("side", open);
  if (!narrow.matches) store.local.set("side", open);
  shade();
  if (open && narrow.matches) $("side-close").focus();
}

function setPanel(open) {
  $("panel").hidden = !open;
  $("panel-open").setAttribute("aria-expanded", String(open));
  shade();
  $(open ? "panel-close" : "panel-open").focus();
}

function shade() {
  const covered = narrow.matches && (document.body.classList.contains("side") || !$("panel").hidden);
  $("shade").hidden = !covered;
  $("center").inert = covered;
}

function closeSides() {
  if (!$("panel").hidden) setPanel(false);
  if (document.body.classList.contains("side")) setSide(false);
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
  store.local.set("theme", next === system ? null : next);
  applyTheme(next === system ? null : next);
}

// ---- Start -----------------------------------------------------------------------------------------------------------------
function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!stop()) submit();
    $("text").focus({ preventScroll: true });
  });
  $("text").addEventListener("keydown", keyInBox);
  $("text").addEventListener("input", () => { problem(""); typed(); });
  const clicks = {
    new: newChat, settings: () => setPanel(true), theme: switchTheme, "help-open": () => $("help").showModal(), import: () => $("file").click(),
    export: () => exportFile(Object.values(state.conversations), "nanochat_conversations.jsonl"), "export-pairs": exportPairs,
    "side-open": () => setSide(!document.body.classList.contains("side")), "side-close": () => { setSide(false); $("side-open").focus(); },
    "panel-open": () => setPanel($("panel").hidden), "panel-close": () => setPanel(false), shade: closeSides,
    undo: () => { undo(); tell(""); $("text").focus(); },
    bottom: () => { sticking = true; $("scroll").scrollTo({ top: $("scroll").scrollHeight, behavior: "smooth" }); $("text").focus({ preventScroll: true }); },
  };
  for (const [id, click] of Object.entries(clicks)) $(id).addEventListener("click", click);
  $("file").addEventListener("change", () => { if ($("file").files[0]) importFile($("file").files[0]); $("file").value = ""; });
  $("scroll").addEventListener("scroll", scrolled, { passive: true });
  document.addEventListener("keydown", keyOnPage);
  addEventListener("popstate", () => show(location.hash.slice(1)));
  addEventListener("offline", connect);
  addEventListener("online", connect);
  addEventListener("pagehide", () => store.tab.set("unsaved", [...running.values()].map(({ conversation }) => state.conversations[conversation])));
  narrow.addEventListener("change", () => { document.body.classList.toggle("side", !narrow.matches && store.local.get("side") !== false); shade(); });
  for (const id of ["scroll", "log"]) new ResizeObserver(() => { follow(); scrolled(); }).observe($(id));
  // A phone's keyboard makes the visual viewport smaller, and on some not the layout's.
  visualViewport?.addEventListener("resize", () => { if (visualViewport.scale === 1) document.documentElement.style.setProperty("--height", `${visualViewport.height}px`); });
}

function keyOnPage(event) {
  const command = event.ctrlKey || event.metaKey;
  if (command && event.shiftKey && event.code === "KeyO") { event.preventDefault(); newChat(); }
  else if (command && !event.shiftKey && event.code === "KeyK") { event.preventDefault(); setSide(true); $("search").focus(); $("search").select(); }
  else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (narrow.matches && !$("shade").hidden) closeSides();
    else stop();
  }
}

// What another tab has written; undefined: it has deleted the conversation. This tab keeps showing the versions it shows.
function fromOtherTab(id, conversation) {
  const own = state.conversations[id];
  if (conversation) {
    const merged = merge(own, conversation);
    setConversation({ ...merged, chosen: { ...merged.chosen, ...own?.chosen } });
    if (id === state.open) settle(id);
  } else if (own && ![...running.values()].some(({ conversation: other }) => other === id)) {
    forget(id);
  }
}

function forget(id) {
  const { [id]: _, ...conversations } = state.conversations;
  change({ conversations });
  if (state.open === id) show(null, "replace");
}

async function start() {
  const theme = store.local.get("theme");
  applyTheme(["light", "dark"].includes(theme) ? theme : null);
  document.body.classList.toggle("side", !narrow.matches && store.local.get("side") !== false);
  const begin = (text) => { $("text").value = text; submit(); $("text").focus({ preventScroll: true }); };
  $("ideas").append(...IDEAS.map(([name, text]) => h("li", {}, h("button", { type: "button", click: () => begin(text) }, h("small", {}, name), h("span", {}, text)))));
  $("commands").append(...Object.values(COMMANDS).flatMap(({ usage, about }) => [h("dt", {}, h("code", {}, usage)), h("dd", {}, about)]));
  listen();
  api.listenToDialog();
  settings.listen(() => { requestRender(); if (described && described !== settings.model()) connect(); });
  sidebar.listen({
    delete: deleteConversation,
    rename: (id, name) => update(id, { ...state.conversations[id], title: name, updated: Date.now() }),
    export: (id) => exportFile([state.conversations[id]], "nanochat_conversation.jsonl"),
  });
  $("text").value = drafts[location.hash.slice(1)] ?? "";
  if (matchMedia("(hover: hover)").matches) $("text").focus();
  const kept = await store.open();
  // What was being written when this tab was reloaded is newer than what the database got.
  for (const conversation of [...(kept ?? []), ...(store.tab.get("unsaved") ?? [])]) setConversation(merge(state.conversations[conversation.id], conversation));
  store.onChange(fromOtherTab);
  if (kept) store.dropTokens(new Set(kept.flatMap((conversation) => Object.keys(conversation.nodes))));
  const early = $("text").value; // what was typed meanwhile
  if (!state.open) show(location.hash.slice(1));
  $("text").value = early;
  typed();
  render();
  connect();
}

start();
