// Conversations as JSONL, which `customjson` reads, and pairs of answers, which DPO reads.
import { create, add, fromMessage, message, messages, path, plain, versions } from "./tree.js";

const jsonl = (rows) => rows.map((row) => `${JSON.stringify(row)}\n`).join("");
const isSound = (node) => node.role === "user" || (node.status !== "failed" && node.status !== "streaming" && node.pieces.some((piece) => piece.text));
const system = (node) => (node?.request?.system ? [{ role: "system", content: node.request.system }] : []);

// A conversation as a row, or null if it has no answer: the messages that are shown, up to the last answer, and the
// whole tree as metadata. An answer with a thumb down gets weight 0: it is context, but not learned.
function row(conversation) {
  const nodes = path(conversation);
  const last = nodes.findLastIndex((node) => node.role === "assistant" && isSound(node));
  if (last < 0) return null;
  const shown = answered(nodes.slice(0, last + 1));
  const learned = shown.map((node) => ({ ...message(node), ...(node.vote < 0 ? { weight: 0 } : {}) }));
  return { messages: [...system(nodes[last]), ...learned], metadata: { nanochat: conversation } };
}

// Without the messages that got no answer.
const answered = (nodes) => nodes.filter((node, i) => (node.role === "user" ? nodes[i + 1] && isSound(nodes[i + 1]) : isSound(node)));

export function exported(conversations) {
  const rows = conversations.map(row).filter(Boolean);
  return { text: jsonl(rows), count: rows.length, skipped: conversations.length - rows.length };
}

// Every two versions of an answer of which one has the better thumb: {prompt: messages, chosen: [answer], rejected: [answer]}.
export function pairs(conversations) {
  const rows = conversations.flatMap((conversation) => Object.values(conversation.nodes).filter((node) => node.role === "user").flatMap((node) => pairsOf(conversation, node)));
  return { text: jsonl(rows), count: rows.length };
}

function pairsOf(conversation, question) {
  const answers = Object.values(conversation.nodes).filter((node) => node.parent === question.id && isSound(node));
  const prompt = messages(answered(ancestors(conversation, question)).concat(question));
  const better = (chosen) => answers.filter((rejected) => chosen.vote > rejected.vote && plain(chosen) !== plain(rejected));
  return answers.flatMap((chosen) => better(chosen).map((rejected) => ({ prompt: [...system(chosen), ...prompt], chosen: [message(chosen)], rejected: [message(rejected)] })));
}

function ancestors(conversation, node) {
  const nodes = [];
  for (let up = conversation.nodes[node.parent]; up; up = conversation.nodes[up.parent]) nodes.unshift(up);
  return nodes;
}

// The conversations of a file. Throws an Error that names the line.
export function imported(text) {
  const lines = text.replace(/^\uFEFF/, "").split("\n").map((line, i) => [i + 1, line]).filter(([, line]) => line.trim());
  if (!lines.length) throw new Error("the file is empty");
  return lines.map(([number, line]) => {
    try {
      return fromRow(JSON.parse(line));
    } catch (error) {
      throw new Error(`line ${number}: ${error instanceof SyntaxError ? "is not valid JSON" : error.message}`);
    }
  });
}

function fromRow(row) {
  const given = Array.isArray(row) ? row : row?.messages;
  if (!Array.isArray(given) || !given.length) throw new Error('expected {"messages": [{"role": …, "content": …}, …]}');
  given.forEach(check);
  const tree = row.metadata?.nanochat;
  if (isTree(tree) && JSON.stringify(exportedMessages(tree)) === JSON.stringify(given)) return tree; // else it was edited
  return fromMessages(given);
}

const exportedMessages = (tree) => row(tree)?.messages;

function check(message, i) {
  const known = ["system", "developer", "user", "assistant"].includes(message?.role);
  const parts = Array.isArray(message?.content) && message.content.every((part) => typeof part?.text === "string");
  if (!known || !(typeof message.content === "string" || parts)) throw new Error(`message ${i + 1}: expected a role (system, user or assistant) and content, a text or parts of text`);
}

function fromMessages(given) {
  const said = given.filter(({ role }) => role === "system" || role === "developer").map(({ content }) => fromMessage({ role: "user", content }).text).join("\n\n");
  let [conversation, parent] = [create(), ""];
  for (const one of given.filter(({ role }) => role === "user" || role === "assistant")) {
    const vote = one.role === "assistant" && one.weight === 0 ? { vote: -1 } : {};
    const request = one.role === "assistant" && said ? { request: { system: said } } : {};
    let node;
    [conversation, node] = add(conversation, parent, { ...fromMessage(one), ...vote, ...request });
    parent = node.id;
  }
  return conversation;
}

// Is this a conversation as tree.js has it? A file can hold anything.
function isTree(tree) {
  const texts = (holder, ...names) => names.every((name) => typeof holder?.[name] === "string");
  if (!texts(tree, "id", "title") || !Number.isFinite(tree.created) || !Number.isFinite(tree.updated)) return false;
  if (typeof tree.nodes !== "object" || typeof tree.chosen !== "object" || !tree.nodes || !tree.chosen) return false;
  const nodes = Object.entries(tree.nodes);
  const isPiece = (piece) => ["text", "python", "output"].includes(piece?.kind) && typeof piece.text === "string";
  const isAnswer = (node) => (node.request?.system === undefined || texts(node.request, "system")) && texts(node, "status", "remark", "error") && [-1, 0, 1].includes(node.vote) && Array.isArray(node.pieces) && node.pieces.every(isPiece);
  const isNode = (id, node) => node?.id === id && Number.isFinite(node.rev) && (node.parent === "" || Boolean(tree.nodes[node.parent]))
    && (node.role === "user" ? texts(node, "text") : node.role === "assistant" && isAnswer(node));
  const isChoice = ([parent, id]) => tree.nodes[id]?.parent === parent;
  return nodes.every(([id, node]) => isNode(id, node)) && Object.entries(tree.chosen).every(isChoice) && isRooted(tree, nodes.length);
}

// No message is its own ancestor.
function isRooted(tree, size) {
  return Object.values(tree.nodes).every((node) => {
    let steps = 0;
    for (let up = node; up; up = tree.nodes[up.parent]) if (++steps > size) return false;
    return true;
  });
}
