// Conversations are kept by the browser, in IndexedDB, with the probabilities of their tokens in a table of their own.
// Tabs tell each other what has changed; what two tabs write is merged, so neither loses anything.
import { merge } from "./tree.js";

const channel = new BroadcastChannel("nanochat");
let database = null; // null where the browser keeps nothing, as in some private windows: then all is lost with the page

const asPromise = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const table = (name, mode = "readonly") => database.transaction(name, mode).objectStore(name);

// undefined where the browser does not let us: its disk is full, or it closes.
const attempt = async (work) => { try { return database ? await work() : undefined; } catch { return undefined; } };

// Open the database and return the conversations; null if the browser has none.
export async function open() {
  try {
    const request = indexedDB.open("nanochat", 1);
    request.onupgradeneeded = () => ["conversations", "tokens"].forEach((name) => request.result.createObjectStore(name, { keyPath: "id" }));
    database = await asPromise(request);
    database.onversionchange = () => database.close();
    for (const id of removing()) await remove(id);
    return await asPromise(table("conversations").getAll());
  } catch {
    database = null;
    return null;
  }
}

// Write a conversation, merged with what another tab has written; not true if that failed.
export const put = (conversation) => attempt(async () => {
  tab.set("removing", removing().filter((id) => id !== conversation.id)); // it was brought back
  const store = table("conversations", "readwrite");
  const stored = await asPromise(store.get(conversation.id));
  await asPromise(store.put(merge(stored, conversation)));
  channel.postMessage(conversation.id);
  return true;
});

// What is being removed: a reload cancels what the database has not done yet.
const removing = () => tab.get("removing") ?? [];

export const remove = (id) => attempt(async () => {
  tab.set("removing", [...removing(), id]);
  await asPromise(table("conversations", "readwrite").delete(id));
  tab.set("removing", removing().filter((other) => other !== id));
  channel.postMessage(id);
});

// Token probabilities of an answer: [[token, log-probability, [[token, log-probability], …]], …]
export const putTokens = (id, tokens) => attempt(() => asPromise(table("tokens", "readwrite").put({ id, tokens })));
export const getTokens = (id) => attempt(async () => (await asPromise(table("tokens").get(id)))?.tokens);

// Forget the tokens of answers that no conversation has any more.
export const dropTokens = (kept) => attempt(async () => {
  const ids = await asPromise(table("tokens").getAllKeys());
  for (const id of ids) if (!kept.has(id)) table("tokens", "readwrite").delete(id);
});

// Call `changed` with the id and the conversation, undefined if it was deleted, when another tab has written it.
export function onChange(changed) {
  channel.onmessage = ({ data }) => attempt(async () => changed(data, await asPromise(table("conversations").get(data))));
}

// ---- Small values: settings of this browser, and what belongs to this tab only --------------------------------------------
const guarded = (storage) => ({
  get(key) { try { return JSON.parse(globalThis[storage].getItem(`nanochat.${key}`)); } catch { return null; } },
  set(key, value) { try { globalThis[storage].setItem(`nanochat.${key}`, JSON.stringify(value)); } catch { /* full or switched off */ } },
});
export const local = guarded("localStorage");
export const tab = guarded("sessionStorage");
