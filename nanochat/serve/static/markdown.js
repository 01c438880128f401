// Answers: Markdown that the server renders (POST /render), of which only a list of tags and attributes enters the page.
import { post } from "./api.js";
import { copy, h, icon, iconButton } from "./dom.js";
import { TOOL } from "./tree.js";

const INTERVAL = 250; // milliseconds between two renderings of a growing answer
const MAX_CHARS = 32_000, MAX_TEXTS = 100; // of a request

// ---- From the server: text to blocks [line on which it begins, HTML] -------------------------------------------------------
const cache = new Map(); // of whole texts, so that a version that was seen before appears at once
let waiting = []; // [{text, resolve, reject}], sent together

function blocksOf(text) {
  if (cache.has(text)) return cache.get(text);
  return new Promise((resolve, reject) => {
    if (!waiting.length) queueMicrotask(sendWaiting);
    waiting.push({ text, resolve, reject });
  });
}

async function sendWaiting() {
  const all = waiting;
  waiting = [];
  while (all.length) {
    let [size, n] = [0, 0];
    while (n < all.length && n < MAX_TEXTS && (size += all[n].text.length) <= MAX_CHARS) n++;
    send(all.splice(0, n || 1)); // a longer text is refused, and stays plain
  }
}

async function send(batch) {
  try {
    const response = await post("/render", { texts: batch.map(({ text }) => text.toWellFormed()) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    (await response.json()).forEach((blocks, i) => batch[i].resolve(blocks));
  } catch (error) {
    batch.forEach(({ reject }) => reject(error));
  }
}

function remember(text, blocks) {
  cache.set(text, blocks);
  if (cache.size > 300) cache.delete(cache.keys().next().value);
}

// ---- Into the document ----------------------------------------------------------------------------------------------------
const policy = globalThis.trustedTypes?.createPolicy("nanochat", { createHTML: (html) => html }) ?? { createHTML: (html) => html };
const TAGS = new Set("P BR HR H1 H2 H3 H4 H5 H6 UL OL LI BLOCKQUOTE PRE CODE STRONG EM S A TABLE THEAD TBODY TR TH TD SPAN".split(" "));

// The same nodes, made anew with nothing but these tags and attributes, whatever the HTML holds.
function safe(node) {
  if (node.nodeType === Node.TEXT_NODE) return [node.data];
  const children = [...node.childNodes].flatMap(safe);
  if (!TAGS.has(node.tagName)) return children;
  if (node.tagName === "PRE") return [codeBlock(node.dataset.language ?? "", children)];
  return [h(node.tagName, attributes(node), ...children)];
}

function attributes(node) {
  const name = node.className;
  if (node.tagName === "A") return /^(https?:\/\/|mailto:)/i.test(node.getAttribute("href") ?? "") ? { href: node.getAttribute("href"), target: "_blank", rel: "noopener noreferrer nofollow" } : {};
  if (node.tagName === "OL" && node.start !== 1) return { start: node.start };
  if (["TH", "TD"].includes(node.tagName) && ["left", "center", "right"].includes(name)) return { class: name };
  if (node.tagName === "CODE" && name === "math") return { class: "math" };
  if (node.tagName === "SPAN" && /^[a-z][a-z0-9]{0,2}$/.test(name)) return { class: name }; // Pygments' names of token types
  return {};
}

function codeBlock(language, children) {
  if (language === "math") return h("pre", { class: "math", tabindex: "0" }, ...children);
  const pre = h("pre", { tabindex: "0" }, ...children);
  const button = iconButton("copy", "Copy code", () => copy(pre.textContent, button));
  return h("div", { class: "code" }, h("div", {}, h("span", {}, language || "text"), button), pre);
}

function toolNode(tool) {
  const node = h("span", { class: "tool" }, icon("tool"), h("span", { class: "name" }, "calculator"), h("span", { class: "hide" }, ": "), h("span", { class: "call" }, tool.call));
  if (tool.output !== null) node.append("=", h("span", { class: "result" }, tool.output));
  return node;
}

// Replace TOOL in the texts below this node by the tool calls, in their order.
function putTools(node, tools) {
  const walk = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walk.nextNode()) if (walk.currentNode.data.includes(TOOL)) texts.push(walk.currentNode);
  for (const text of texts) text.replaceWith(...text.data.split(TOOL).flatMap((part, i) => (i && tools.length ? [toolNode(tools.shift()), part] : [part])));
}

function element(html, tools) {
  const parsed = new DOMParser().parseFromString(policy.createHTML(html), "text/html").body;
  const [node = h("p")] = [...parsed.children].flatMap(safe).filter((child) => child instanceof Element);
  putTools(node, [...tools]);
  return node;
}

// ---- A growing text ---------------------------------------------------------------------------------------------------------
const offsetOf = (text, line) => { let at = 0; while (line--) at = text.indexOf("\n", at) + 1; return at; };
const toolsBefore = (text) => text.split(TOOL).length - 1;

// Show Markdown in `body`: what the server has not rendered yet as plain text at the end of it. Blocks that do not change
// keep their nodes, and so a selection in them. While the text grows only its last block is rendered again.
export function markdownView(body) {
  let shown = { text: "", done: false, blocks: [] }; // rendered; blocks: [{start, key, node}]
  let wanted = { text: "", tools: [], done: false };
  let [busy, timer, last, failures] = [false, 0, 0, 0];

  function show(text, tools, done) {
    wanted = { text, tools, done };
    const known = done && cache.get(text);
    if (known) place(0, known, wanted);
    else schedule();
    showTail();
  }

  const isCurrent = () => shown.text === wanted.text && shown.done === wanted.done && shown.tools === JSON.stringify(wanted.tools);

  function schedule() {
    clearTimeout(timer);
    if (busy || isCurrent() || failures > 5) return;
    const pause = failures ? 1000 * 2 ** failures : INTERVAL;
    timer = setTimeout(renderNow, Math.max(0, last + pause - performance.now()));
  }

  async function renderNow() {
    const target = wanted;
    const from = target.done || !target.text.startsWith(shown.text) ? 0 : shown.blocks.at(-1)?.start ?? 0;
    [busy, last] = [true, performance.now()];
    try {
      const blocks = await blocksOf(target.text.slice(from));
      if (target.done) remember(target.text, blocks);
      failures = 0;
      if (!wanted.text.startsWith(target.text)) return; // another text by now
      place(from, blocks, target);
    } catch {
      failures++; // it stays plain text until then
    } finally {
      busy = false;
      showTail();
      schedule();
    }
  }

  function place(from, made, { text, tools, done }) {
    const kept = shown.blocks.filter((block) => block.start < from);
    const starts = made.map(([line]) => from + offsetOf(text.slice(from), line));
    const blocks = made.map(([, html], i) => {
      const own = tools.slice(toolsBefore(text.slice(0, starts[i])), toolsBefore(text.slice(0, starts[i + 1])));
      const key = JSON.stringify([html, own]);
      const old = shown.blocks[kept.length + i];
      return { start: starts[i], key, node: old?.key === key ? old.node : element(html, own) };
    });
    tail.remove();
    paragraph.remove();
    shown = { text, done, tools: JSON.stringify(tools), blocks: [...kept, ...blocks] };
    shown.blocks.forEach(({ node }, i) => {
      if (body.children[i] !== node) body.children[i] ? body.children[i].replaceWith(node) : body.append(node);
    });
    while (body.children.length > shown.blocks.length) body.lastElementChild.remove();
  }

  const tail = h("span", { class: "tail" });
  const paragraph = h("p", {});
  function showTail() {
    tail.remove();
    paragraph.remove();
    if (!wanted.text.startsWith(shown.text)) return place(0, [], { ...wanted, text: "" }), showTail();
    const rest = wanted.text.slice(shown.text.trimEnd().length);
    if (!rest.trim()) return;
    tail.replaceChildren(rest);
    putTools(tail, wanted.tools.slice(toolsBefore(shown.text.trimEnd())));
    const end = openEnd(shown.blocks.at(-1)?.node, shown.text, rest);
    if (end) return end.append(tail);
    tail.replaceChildren(...[...tail.childNodes].map((child, i) => (i || child.nodeType !== Node.TEXT_NODE ? child : child.data.trimStart())));
    paragraph.append(tail);
    body.append(paragraph);
  }

  return show;
}

// Where the text after this block continues; null: in a new paragraph.
function openEnd(block, text, rest) {
  if (block?.matches(".code")) return /\n\s*(`{3,}|~{3,})\s*$/.test(text) ? null : block.querySelector("code");
  if (!block || !block.matches("p, ul, ol, blockquote, h1, h2, h3, h4, h5, h6") || /^\s*\n\s*\n/.test(rest)) return null;
  let node = block;
  while (node.lastElementChild?.matches("p, ul, ol, li, blockquote")) node = node.lastElementChild;
  return node;
}
