"""What a process with transformers and without this project computes from an exported folder: a script.

python -I transformers_process.py <folder> <inputs.pt> <outputs.pt>
"""

import sys
from typing import Any

sys.modules["nanochat"] = None  # type: ignore[assignment]  # an import of it fails

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

folder, inputs_path, outputs_path = sys.argv[1:]
inputs, out = torch.load(inputs_path), {}
tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens, n = inputs["tokens"], inputs["tokens"].shape[1]

out["texts"] = tok(inputs["texts"]).input_ids
out["decoded"] = [tok.decode(ids) for ids in out["texts"][:50]]
out["parsed"] = tok("a<|bos|>", split_special_tokens=False).input_ids
template = {"add_generation_prompt": False, "return_dict": True}
out["conversations"] = [tok.apply_chat_template(x, **template)["input_ids"] for x in inputs["conversations"]]
rendered = [tok.apply_chat_template(x, tokenize=False) for x in inputs["conversations"]]
out["rendered"] = [tok(text).input_ids for text in rendered]
out["rendered_parsed"] = [tok(text, split_special_tokens=False).input_ids for text in rendered]
out["prompt"] = tok.apply_chat_template(inputs["conversations"][0][:1], add_generation_prompt=True)["input_ids"]
out["refused"] = []
for messages in inputs["refused"]:
    try:
        tok.apply_chat_template(messages)
        out["refused"].append("")
    except Exception as error:
        out["refused"].append(str(error))

with torch.no_grad():
    out["logits"] = model(tokens).logits
    right = torch.ones_like(tokens)
    right[0, n - 7 :] = 0
    out["right_padded"] = model(tokens, attention_mask=right).logits[0, : n - 7]
    left, shifted = torch.ones_like(tokens), torch.roll(tokens, 7, 1)
    left[0, :7], shifted[0, :7] = 0, 5
    out["left_padded"] = model(shifted, attention_mask=left).logits[0, 7:]
    steps, cache = [], None
    for start, end in ((0, 100), (100, 101), (101, 150), (150, n)):
        step = model(tokens[:, start:end], **({"cache": cache} if cache is not None else {}))
        steps.append(step.logits)
        cache = step["cache"] if "cache" in step else step["past_key_values"]
    out["steps"] = torch.cat(steps, dim=1)
    model.set_attn_implementation("eager")
    eager = model(tokens, output_attentions=True, output_hidden_states=True)
    out["eager"], out["n_attentions"], out["n_hidden"] = eager.logits, len(eager.attentions), len(eager.hidden_states)
    model.set_attn_implementation("sdpa")

greedy = {"max_new_tokens": 64, "do_sample": False}
out["single"] = [model.generate(torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in inputs["prompts"]]
batch = tok.pad({"input_ids": inputs["prompts"]}, return_tensors="pt")
out["batch"] = model.generate(**batch, **greedy)[:, batch["input_ids"].shape[1] :].tolist()
beams = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
out["beams"] = model.generate(torch.tensor(inputs["prompts"][:1]), **beams).tolist()
out["beams_uncached"] = model.generate(torch.tensor(inputs["prompts"][:1]), use_cache=False, **beams).tolist()

model.train()
grads = []
for checkpointing in (False, True):
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
out["loss"] = loss.item()
out["same_grads"] = [name for name in grads[0] if torch.allclose(grads[0][name], grads[1][name], atol=1e-6)]
out["grads"] = list(grads[0])
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
out["half"] = half(tokens).logits.detach()
out["half_dtypes"] = {name: str(p.dtype) for name, p in half.named_parameters()}
model.save_pretrained(f"{outputs_path}.folder")
tok.save_pretrained(f"{outputs_path}.folder")
torch.save(out, outputs_path)
