// The messages of the open conversation.
import { $, announce, copy, h, icon, iconButton, number } from "./dom.js";
import { markdownView } from "./markdown.js";
import { tokensView } from "./tokens.js";
import { compile, path, plain, unanswered, versions } from "./tree.js";

// {edit(node), send(node, text), cancel(), regenerate(node), choose(node), vote(node, value), tokens(node), refusal(node, text)}
let actions = null;
export const useActions = (given) => { actions = given; };

export const composing = (event) => event.isComposing || event.keyCode === 229; // an input method's Enter picks a word

export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

const views = new Map(); // id → {node, item, show, key}

// Draw the messages that are shown; `editing` and `inspected` ({id, tokens}) are what the user has opened.
export function drawMessages(conversation, editing, inspected) {
  const log = $("log");
  const items = path(conversation);
  const out = unanswered(items);
  const ids = new Set(items.map((item) => item.id));
  for (const [id, { node }] of views) if (!ids.has(id)) { node.remove(); views.delete(id); }
  items.forEach((item, i) => {
    const all = versions(conversation, item);
    const seen = inspected?.id === item.id ? inspected : null;
    const node = view(item, all, { editing: editing === item.id, out: out.has(item.id), seen });
    if (log.children[i] !== node) log.insertBefore(node, log.children[i] ?? null);
  });
  log.hidden = !items.length;
  $("empty").hidden = !log.hidden;
}

export const focusIn = (id, label) => views.get(id)?.node.querySelector(`[aria-label="${label}"]`)?.focus();

function view(item, all, { editing, out, seen }) {
  const old = views.get(item.id);
  const key = [editing, out, all.length];
  if (old && old.item === item && old.seen === seen && old.key.every((value, i) => value === key[i])) return old.node;
  const now = { ...(old ?? made(item)), item, seen, key };
  views.set(item.id, now);
  const role = item.role === "user" ? "user" : `answer ${item.status === "streaming" ? "streaming" : "done"}`;
  now.node.className = `${role}${editing ? " editing" : ""}${out ? " unanswered" : ""}${seen ? " inspected" : ""}`;
  now.node.title = out ? "Not sent to the model: it has no answer" : "";
  if (item.role === "user") paintUser(now.node, item, all, editing);
  else paintAnswer(now, all);
  return now.node;
}

function made(item) {
  const node = h("article");
  if (item.role === "user") return { node };
  const body = h("div", { class: "body" });
  node.append(h("span", { class: "hide" }, "nanochat: "), body, h("div", { class: "seen" }), h("div", { class: "end" }), h("div", { class: "actions" }));
  return { node, show: markdownView(body) };
}

// ‹ 2/3 ›
function switcher(item, all) {
  if (all.length < 2) return [];
  const at = all.findIndex(({ id }) => id === item.id);
  const go = (step, label) => () => { actions.choose(all[at + step]); focusIn(all[at + step].id, label); };
  const button = (step, name, label) => iconButton(name, label, go(step, label), { disabled: !all[at + step] });
  const place = h("span", { class: "place" }, h("span", { class: "hide" }, "Version "), `${at + 1}/${all.length}`);
  return [h("span", { class: "versions", role: "group", "aria-label": "Versions" }, button(-1, "previous", "Previous version"), place, button(1, "next", "Next version"))];
}

function paintUser(node, item, all, editing) {
  if (editing) return node.querySelector(".editor") ? null : node.replaceChildren(editor(item));
  const button = iconButton("copy", "Copy message", () => copy(item.text, button));
  node.replaceChildren(
    h("span", { class: "hide" }, "You: "), h("div", { class: "bubble" }, item.text),
    h("div", { class: "actions" }, ...switcher(item, all), iconButton("edit", "Edit message", () => actions.edit(item)), button),
  );
}

function editor(item) {
  const area = h("textarea", { rows: "1", "aria-label": "Edit message" });
  const wrong = h("div", { class: "problem", role: "alert", hidden: true });
  const accept = (event) => {
    event?.preventDefault();
    wrong.textContent = actions.send(item, area.value);
    wrong.hidden = !wrong.textContent;
  };
  const cancel = () => { actions.cancel(); focusIn(item.id, "Edit message"); };
  area.value = item.text;
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) accept(event);
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
  });
  requestAnimationFrame(() => { grow(area); area.focus(); area.scrollIntoView({ block: "center" }); });
  return h("form", { class: "editor", submit: accept }, area,
    h("div", { class: "row" }, h("span", { class: "count" }, "The earlier version is kept"), h("button", { class: "plain", type: "button", click: cancel }, "Cancel"), h("button", { class: "plain strong", type: "submit" }, "Send")), wrong);
}

function paintAnswer({ node, item, show, seen }, all) {
  const [, body, tokens, end, buttons] = node.children;
  const streaming = item.status === "streaming";
  const { text, tools } = compile(item.pieces);
  show(text, tools, !streaming);
  body.hidden = Boolean(seen);
  tokens.replaceChildren(...(seen ? [tokensView(seen.tokens)] : []));
  const waiting = streaming && !item.pieces.length;
  const parts = waiting ? [h("span", { class: "dots", role: "img", "aria-label": "Thinking" }, h("i"), h("i"), h("i"))] : [];
  if (item.error) parts.push(h("div", { class: "error" }, icon("alert"), h("span", {}, item.error), h("button", { class: "plain", type: "button", click: () => actions.regenerate(item) }, icon("again"), "Retry")));
  const remark = item.remark || (item.status === "done" && !item.pieces.length ? "The answer is empty." : "");
  if (remark) parts.push(h("p", { class: "remark" }, remark));
  end.replaceChildren(...parts);
  if (streaming) return buttons.replaceChildren();
  const focused = buttons.contains(document.activeElement) ? document.activeElement.ariaLabel : null;
  buttons.replaceChildren(...switcher(item, all), ...answerButtons(item, seen));
  if (focused) focusIn(item.id, focused);
}

function answerButtons(item, seen) {
  const copyButton = iconButton("copy", "Copy answer", () => copy(plain(item), copyButton));
  const thumb = (value, name, label) => iconButton(name, label, () => actions.vote(item, item.vote === value ? 0 : value), { "aria-pressed": String(item.vote === value) });
  const again = h("button", { class: "quiet", type: "button", "aria-label": "Regenerate answer", title: "Another version; this one is kept", click: () => actions.regenerate(item) }, icon("again"), h("span", {}, "Regenerate"));
  const inspect = item.hasTokens ? [iconButton("tokens", "Token probabilities", () => actions.tokens(item), { "aria-pressed": String(Boolean(seen)) })] : [];
  const ofText = plain(item) ? [copyButton, thumb(1, "good", "Good answer"), thumb(-1, "bad", "Bad answer")] : [];
  return [...ofText, ...inspect, ...(item.error ? [] : [again]), ...speed(item)];
}

function speed({ speed, request }) {
  const about = request ? Object.entries(request).filter(([name]) => !["logprobs", "top_logprobs", "system"].includes(name)).map(([name, value]) => `${name} ${value}`).join(", ") : "";
  if (!speed) return [];
  const rate = speed.seconds > 0 && speed.tokens > 1 ? ` · ${number(Math.round((speed.tokens - 1) / speed.seconds))} tokens/s` : "";
  return [h("span", { class: "speed", title: about }, `${request?.model ? `${request.model} · ` : ""}${number(speed.tokens)} tokens${rate}`)];
}

export function announceAnswer(item) {
  announce(`${plain(item)} ${item.error || item.remark || ""}`.trim());
}
