// The list of conversations: by day, searched, with a menu for each.
import { $, h, icon, iconButton } from "./dom.js";
import { plain, title } from "./tree.js";

let state = { conversations: {}, open: null };
let actions = null; // {rename(id, title), export(id), delete(id)}
let [renaming, menuOf] = [null, null];
let drawn = ""; // what the list shows

// Draw the list of `conversations`, with the one that is open marked.
export function drawList(conversations, open) {
  if (conversations === state.conversations && open === state.open) return;
  state = { conversations, open };
  draw();
}

// A list that shows the same stays as it is: while an answer grows, links keep the focus and get their clicks.
function draw() {
  if (renaming && document.activeElement?.closest(".renaming")) return; // not under the user's hands
  const words = $("search").value.trim().toLowerCase();
  const all = Object.values(state.conversations).sort((a, b) => b.updated - a.updated);
  const found = all.map((conversation) => [conversation, match(conversation, words)]).filter(([, matched]) => matched !== null);
  const groups = Map.groupBy ? Map.groupBy(found, ([{ updated }]) => day(updated)) : new Map([["", found]]);
  const shows = JSON.stringify([[...groups].map(([name, rows]) => [name, rows.map(([conversation, matched]) => [conversation.id, title(conversation), matched])]), state.open, renaming, all.length > 0]);
  if (shows === drawn) return;
  drawn = shows;
  const focused = $("chats").contains(document.activeElement) ? document.activeElement.ariaLabel ?? document.activeElement.hash : null;
  const empty = all.length ? "Nothing found." : "Your conversations appear here. They stay in this browser.";
  $("chats").replaceChildren(...(found.length ? [...groups].flatMap(([name, rows]) => [h("h2", {}, name), h("ul", {}, ...rows.map(entry))]) : [h("p", {}, empty)]));
  if (focused) [...$("chats").querySelectorAll("a, button")].find((node) => [node.ariaLabel, node.hash].includes(focused))?.focus();
}

// "" or the text around the first match; null if there is none.
function match(conversation, words) {
  if (!words || title(conversation).toLowerCase().includes(words)) return "";
  for (const node of Object.values(conversation.nodes)) {
    const text = plain(node);
    const at = text.toLowerCase().indexOf(words);
    if (at >= 0) return `${at > 15 ? "…" : ""}${text.slice(Math.max(0, at - 15), at + 60)}`;
  }
  return null;
}

function day(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - time) / 86_400_000);
  return days <= 0 ? "Today" : days === 1 ? "Yesterday" : days <= 7 ? "Last 7 days" : days <= 30 ? "Last 30 days" : "Older";
}

function entry([conversation, matched]) {
  const { id } = conversation;
  if (id === renaming) return h("li", { class: "renaming" }, renameForm(conversation));
  const link = h("a", { href: `#${id}`, title: title(conversation), ...(id === state.open ? { "aria-current": "page" } : {}) }, h("span", {}, title(conversation)), ...(matched ? [h("small", {}, matched)] : []));
  return h("li", {}, link, iconButton("more", `Menu of ${title(conversation)}`, (event) => showMenu(id, event.currentTarget), { "aria-haspopup": "menu", title: "Rename, export, delete" }));
}

function renameForm(conversation) {
  const input = h("input", { "aria-label": "Title", maxlength: "100" });
  input.value = title(conversation);
  const end = (accepted) => {
    if (renaming === null) return;
    renaming = null;
    if (accepted && input.value.trim()) actions.rename(conversation.id, input.value.trim());
    draw();
    $("chats").querySelector(`a[href="#${conversation.id}"]`)?.focus();
  };
  input.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); end(false); } });
  input.addEventListener("blur", () => end(true));
  return h("form", { submit: (event) => { event.preventDefault(); end(true); } }, input);
}

function showMenu(id, button) {
  menuOf = id;
  const menu = $("chat-menu");
  menu.showPopover();
  const { bottom, right } = button.getBoundingClientRect();
  menu.style.top = `${Math.min(bottom, innerHeight - menu.offsetHeight - 8)}px`;
  menu.style.left = `${Math.max(8, right - menu.offsetWidth)}px`;
  menu.querySelector("button").focus();
}

function keyInMenu(event) {
  const buttons = [...$("chat-menu").querySelectorAll("button")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length).focus();
}

export function listen(given) {
  actions = given;
  $("search").addEventListener("input", draw);
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { $("search").value = ""; draw(); }
    if (event.key === "Enter" || event.key === "ArrowDown") { event.preventDefault(); $("chats").querySelector("a")?.focus(); }
  });
  $("chats").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const links = [...$("chats").querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    (links[at + step] ?? (step < 0 ? $("search") : links[at])).focus();
  });
  $("chat-menu").addEventListener("keydown", keyInMenu);
  $("chat-menu").addEventListener("click", (event) => {
    const act = event.target.closest("button")?.dataset.act;
    $("chat-menu").hidePopover();
    if (act === "rename") {
      renaming = menuOf;
      draw();
      const input = $("chats").querySelector(".renaming input");
      input?.focus(); // not every browser focuses what it selects
      input?.select();
    } else if (act) actions[act](menuOf);
  });
}
