// The token view: each token of an answer, colored by its probability, with its five likeliest alternatives.
import { h } from "./dom.js";

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100%" : p < 0.01 ? "<0.01%" : `${p < 1 ? p.toFixed(2) : p.toFixed(1)}%`;
};

// White space has to be visible: a token often is only that.
const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";
const level = (logprob) => [0.9, 0.6, 0.3, 0.1, 0].findIndex((least) => Math.exp(logprob) >= least);

// tokens: [[token, log-probability, [[alternative, log-probability], …]], …]
export function tokensView(tokens) {
  const info = h("div", { class: "token-info", role: "status" });
  const buttons = tokens.map(([token, logprob], i) => {
    const events = { focus: () => choose(i), mouseenter: () => choose(i), click: () => choose(i) };
    return h("button", { class: `token level${level(logprob)}`, type: "button", tabindex: "-1", "aria-label": `${visible(token)}, ${percent(logprob)}`, ...events }, token.includes("\n") ? visible(token) : token);
  });
  function choose(i) {
    buttons.forEach((button, j) => { button.classList.toggle("chosen", i === j); button.tabIndex = i === j ? 0 : -1; });
    info.replaceChildren(...description(tokens[i], i, tokens.length));
  }
  const move = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = buttons.findIndex((button) => button.tabIndex === 0);
    buttons[Math.min(Math.max(now + step, 0), buttons.length - 1)].focus();
  };
  choose(0);
  const total = tokens.reduce((sum, [, logprob]) => sum + logprob, 0);
  const summary = `${tokens.length} tokens, perplexity ${Math.exp(-total / tokens.length).toFixed(2)}. Point at a token, or use the arrow keys.`;
  const legend = h("p", { class: "legend" }, "Probability: ", ...["90%", "60%", "30%", "10%", "less"].map((text, i) => h("span", { class: `level${i}` }, text)));
  return h("div", { class: "tokens" }, h("div", { class: "token-text", role: "group", "aria-label": "Tokens of the answer", keydown: move }, ...buttons.flatMap((button, i) => (tokens[i][0].includes("\n") ? [button, h("br")] : [button]))), info, legend, h("p", { class: "legend" }, summary));
}

function description([token, logprob, alternatives], i, n) {
  const rows = alternatives.some(([other]) => other === token) ? alternatives : [...alternatives, [token, logprob]];
  const items = rows.map(([other, value]) => {
    const bar = h("span", { class: "bar" });
    bar.style.width = `${100 * Math.exp(value)}%`;
    return h("li", { class: other === token && "taken" }, h("code", {}, visible(other)), h("span", { class: "track" }, bar), h("span", { class: "percent" }, percent(value)));
  });
  return [h("p", {}, `Token ${i + 1} of ${n}: `, h("code", {}, visible(token)), ` had ${percent(logprob)}.`), h("ol", {}, ...items)];
}
