// The document: elements, icons, the clipboard and what screen readers are told.

export const $ = (id) => document.getElementById(id);

// An element. Children are nodes or strings, and strings become text nodes: nothing here parses markup.
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const iconButton = (name, label, click, more = {}) => h("button", { class: "icon", type: "button", "aria-label": label, title: label, click, ...more }, icon(name));

// A screen reader does not read the same text twice: a no-break space makes it different.
export function announce(text) {
  $("live").textContent = $("live").textContent === text ? `${text}\u00A0` : text;
}

export async function copy(text, button) {
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

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const number = (n) => n.toLocaleString("en");
export const count = (n, thing) => `${number(n)} ${thing}${n === 1 ? "" : "s"}`;
