// A conversation is a tree of messages that only grows: an edit or another answer is one more child of the same parent.
//
// conversation: {id, title, created, updated, nodes: {id: node}, chosen: {id of a parent, "" for the root: id of a child}}
// node: {id, parent, role: "user", text} | {id, parent, role: "assistant", pieces: [{kind, text}], status, remark, error,
//        vote: 1 | 0 | -1, request, speed: {tokens, seconds}}, with `rev`, the number of its changes
// status: "streaming" | "done" | "stopped" | "failed". Every function returns a new value and changes none.

export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

export const create = (now = Date.now()) => ({ id: newId(), title: "", created: now, updated: now, nodes: {}, chosen: {} });

// The messages that are shown, from the first to the last.
export function path(conversation) {
  const nodes = [];
  for (let id = conversation?.chosen[""]; id; id = conversation.chosen[id]) nodes.push(conversation.nodes[id]);
  return nodes;
}

export const before = (conversation, id) => {
  const nodes = path(conversation);
  return nodes.slice(0, nodes.findIndex((node) => node.id === id));
};

// A node and its other versions, the oldest first.
export const versions = (conversation, node) => Object.values(conversation.nodes).filter((other) => other.parent === node.parent);

export function add(conversation, parent, values) {
  const node = { id: newId(), parent, rev: 1, ...values };
  const nodes = { ...conversation.nodes, [node.id]: node };
  return [{ ...conversation, nodes, chosen: { ...conversation.chosen, [parent]: node.id }, updated: Date.now() }, node];
}

export function patch(conversation, id, values) {
  const node = conversation.nodes[id];
  return { ...conversation, nodes: { ...conversation.nodes, [id]: { ...node, ...values, rev: node.rev + 1 } }, updated: Date.now() };
}

export const choose = (conversation, node) => ({ ...conversation, chosen: { ...conversation.chosen, [node.parent]: node.id }, updated: Date.now() });

// Both of two states of a conversation, of two tabs: all messages, and of each the one that was changed more.
export function merge(one, other) {
  if (!one || !other) return one ?? other;
  const [older, newer] = one.updated <= other.updated ? [one, other] : [other, one];
  const nodes = { ...older.nodes };
  for (const node of Object.values(newer.nodes)) if (!(nodes[node.id]?.rev > node.rev)) nodes[node.id] = node;
  return { ...newer, nodes, chosen: { ...older.chosen, ...newer.chosen } };
}

export const title = (conversation) => conversation.title || firstText(conversation).replace(/\s+/g, " ").trim().slice(0, 60) || "New chat";
const firstText = (conversation) => path(conversation)[0]?.text ?? "";

// Pieces become one text, in which TOOL stands for each tool call, and the list of the calls.
export const TOOL = "\uFFFC";
export function compile(pieces) {
  const tools = [];
  let text = "";
  for (const piece of pieces) {
    if (piece.kind === "text") text += piece.text.replaceAll(TOOL, "\uFFFD").replaceAll(/\r\n?/g, "\n");
    else if (piece.kind === "output" && tools.length && tools.at(-1).output === null) tools[tools.length - 1] = { ...tools.at(-1), output: piece.text };
    else {
      tools.push(piece.kind === "python" ? { call: piece.text, output: null } : { call: "", output: piece.text });
      text += TOOL;
    }
  }
  return { text, tools };
}

// A message as plain text, for copying, searching and reading aloud.
export function plain(node) {
  if (node.role === "user") return node.text;
  const { text, tools } = compile(node.pieces);
  let next = 0;
  return text.replaceAll(TOOL, () => (({ call, output }) => `[calculator: ${call}${output === null ? "" : ` = ${output}`}]`)(tools[next++]));
}

// Append a token of text, or of a tool call or its output, to the pieces.
export function appended(pieces, kind, text) {
  const last = pieces.at(-1);
  return last?.kind === kind ? [...pieces.slice(0, -1), { kind, text: last.text + text }] : [...pieces, { kind, text }];
}

// ---- What is sent to the model ------------------------------------------------------------------------------------------
const PARTS = { text: "text", python: "python", output: "python_output" };

// A message as the API and training take it: an answer is a string, or parts if it has tool calls.
export function message(node) {
  if (node.role === "user") return { role: "user", content: node.text };
  const parts = node.pieces.map((piece) => ({ type: PARTS[piece.kind], text: piece.text }));
  const content = parts.some((part) => part.type !== "text") ? parts : parts.map((part) => part.text).join("");
  return { role: "assistant", content };
}

// The inverse of `message`.
export function fromMessage({ role, content }) {
  const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
  if (role === "user") return { role, text: parts.map((part) => part.text).join("\n") };
  const kinds = Object.fromEntries(Object.entries(PARTS).map(([kind, type]) => [type, kind]));
  return { role, pieces: parts.map((part) => ({ kind: kinds[part.type] ?? "text", text: part.text })), status: "done", remark: "", error: "", vote: 0 };
}

const isEmpty = (node) => node.role === "assistant" && !node.pieces.some((piece) => piece.text);

// Messages whose answer is empty, and those answers: not sent, since roles must alternate.
export function unanswered(nodes) {
  return new Set(nodes.flatMap((node, i) => (isEmpty(node) && i < nodes.length - 1 ? [node.id, node.parent] : [])));
}

export function messages(nodes) {
  const out = unanswered(nodes);
  return nodes.filter((node) => !out.has(node.id)).map(message);
}
