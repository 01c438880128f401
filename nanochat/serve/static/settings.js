// The settings panel: how answers are sampled. What the user does not change follows the server's defaults.
import { getJson } from "./api.js";
import { $, h } from "./dom.js";
import { local } from "./store.js";

const ROWS = [ // name, label, step (null: a number that has no slider), help
  ["temperature", "Temperature", 0.1, "0 takes the likeliest token; higher is more random."],
  ["top_p", "Top-p", 0.01, "Sample among the likeliest tokens that have this probability together; 1: all."],
  ["top_k", "Top-k", 1, "Sample among so many likeliest tokens; 0: all."],
  ["max_tokens", "Max tokens", null, "Length of an answer."],
  ["seed", "Seed", null, "The same seed gives the same answer."],
];
let server = null; // {limits, sampling: {name: {default, minimum, maximum}}}, once it is known
let models = []; // their names, the default first
let changed = local.get("settings") ?? {};
let notify = () => {};

export const limits = () => server?.limits;
export const range = (name) => server?.sampling[name];
const value = (name) => changed[name] ?? range(name)?.default;

// The model that answers; one chosen before may not be served any more.
export const model = () => (models.includes(changed.model) ? changed.model : models[0]);

// What a request has to say, with a seed in any case, so that the answer can be repeated.
export function sampling() {
  const names = ROWS.map(([name]) => name).filter((name) => value(name) != null);
  const logprobs = changed.logprobs ?? true ? { logprobs: true, top_logprobs: 5 } : {};
  const named = models.length > 1 ? { model: model() } : {};
  return { seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1, ...Object.fromEntries(names.map((name) => [name, value(name)])), ...logprobs, ...named };
}

export const systemPrompt = () => (changed.system ?? "").trim();

export function summary() {
  if (!server) return "Sampling";
  const top = value("top_k") ? `top-k ${value("top_k")}` : "top-k off";
  const more = [value("top_p") < 1 ? `top-p ${value("top_p")}` : "", systemPrompt() ? "system prompt" : "", changed.seed != null ? `seed ${changed.seed}` : ""];
  return [`temperature ${value("temperature")}`, top, ...more].filter(Boolean).join(" · ");
}

export function set(name, wanted) {
  changed = { ...changed, [name]: wanted };
  if (wanted === undefined || wanted === range(name)?.default) delete changed[name];
  local.set("settings", changed);
  fill();
  notify();
}

// Why this text cannot be the value of a setting; "" if it can.
export function objection(name, text) {
  const { minimum, maximum } = range(name) ?? {};
  const [low, high] = [minimum ?? 0, maximum ?? Number.MAX_SAFE_INTEGER];
  const number = /^[+-]?(\d+\.?\d*|\.\d+)$/.test(text) ? Number(text) : NaN;
  const whole = !["temperature", "top_p"].includes(name);
  if (number >= low && number <= high && !(whole && !Number.isInteger(number))) return "";
  return maximum == null ? `a whole number from ${low}` : `a ${whole ? "whole " : ""}number from ${low} to ${high}`;
}

// Ask the server for its defaults and models.
export async function load() {
  const [page, { data }] = await Promise.all([getJson("/page"), getJson("/v1/models")]);
  server = page;
  models = data.map(({ id }) => id);
  $("models").hidden = models.length < 2;
  $("sampling").elements.model.replaceChildren(...models.map((id) => h("option", { value: id }, id)));
  $("numbers").replaceChildren(...ROWS.map(row));
  fill();
  notify();
}

function row([name, label, step, help]) {
  const { minimum, maximum } = range(name);
  const wrong = h("small", { class: "wrong", role: "alert", hidden: true });
  const input = h("input", { name, inputmode: "decimal", autocomplete: "off", placeholder: name === "seed" ? "random" : false, change: () => take(name, input, wrong) });
  const slider = step === null ? [] : [h("input", { type: "range", "data-of": name, min: minimum, max: maximum, step, "aria-label": `${label}, slider`, input: (event) => set(name, Number(event.target.value)) })];
  return h("div", { class: "number" }, h("label", {}, h("span", {}, label), input), ...slider, h("small", {}, help), wrong);
}

function take(name, input, wrong) {
  const text = input.value.trim();
  const problem = text ? objection(name, text) : "";
  wrong.textContent = problem && `Expected ${problem}.`;
  wrong.hidden = !problem;
  if (!problem) set(name, text ? Number(text) : undefined);
}

function fill() {
  const { system, logprobs, model: menu } = $("sampling").elements;
  if (document.activeElement !== system) system.value = changed.system ?? "";
  logprobs.checked = changed.logprobs ?? true;
  if (models.length) menu.value = model();
  for (const input of $("numbers").querySelectorAll("input")) input.value = value(input.name || input.dataset.of) ?? "";
}

// `changedNow` is called after each change.
export function listen(changedNow) {
  notify = changedNow;
  const { system, logprobs, model: menu } = $("sampling").elements;
  system.addEventListener("input", () => set("system", system.value || undefined));
  logprobs.addEventListener("change", () => set("logprobs", logprobs.checked ? undefined : false));
  menu.addEventListener("change", () => set("model", menu.value));
  $("sampling").addEventListener("submit", (event) => event.preventDefault());
  $("defaults").addEventListener("click", () => { changed = {}; system.value = ""; local.set("settings", changed); fill(); notify(); });
  fill();
}
