"""Export a model: to Hugging Face transformers, safetensors, karpathy's nanochat, or a torch.export program.

    python launch.py --experiment=export --set run=quickstart_sft                      # a folder for transformers
    python launch.py --experiment=export --set run=d20_sft --set dtype=bfloat16        # half the size
    python launch.py --experiment=export --set run=d20_sft --set format=pt2            # runs where only torch is

- hf: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, with nothing of this project installed:
  weights, configuration and modeling code, tokenizer, chat template, a model card. Needs `pip install -e ".[hf]"`.
- safetensors: the parameters under their own names, the config and the tokenizer.
- reference: model_*.pt and meta_*.json of karpathy/nanochat.
- pt2: two `torch.export` programs with the weights inside, prefill and one decode step, for any batch and length.

`--experiment=convert --set model=<folder>` reads the first three back, bit for bit. Takes seconds, for pt2 half
a minute, and twice the memory of the model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanochat import checkpoint, distributed, jsonl, metrics, model
from nanochat.config import Device, Dtype, NonNegativeInt, PositiveInt, Settings, UserError, base_dir
from nanochat.data import tokenizer
from nanochat.text import format_count, format_duration, reason

if TYPE_CHECKING:
    from tensordict import TensorDict

    from nanochat.checkpoint import CheckpointInfo
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to export.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. name@100: its step 100.
        step: of the checkpoint; none: the newest.
        format: see above.
        out: folder to write, which must not exist; none: exports/<run>_<format> under the base folder.
        dtype: of matrices and embeddings; auto: as they are stored, which loses nothing (pt2: float32).
        device: for pt2, where the program will run.
        context: for pt2, the most tokens of a conversation; none: the training context.
        aot: for pt2, also compile both programs for this machine with AOTInductor, which needs a C++ compiler.
    """

    run: str | None = None
    step: NonNegativeInt | None = None
    format: Literal["hf", "safetensors", "reference", "pt2"] = "hf"
    out: str | None = None
    dtype: Dtype = "auto"
    device: Device = "cpu"
    context: PositiveInt | None = None
    aot: bool = False


config = Config


def run(config: Config, runtime: Runtime) -> None:
    distributed.require_single(runtime, "export")
    if config.format != "pt2" and (config.aot or config.context):
        raise UserError(f"format={config.format}: aot and context are settings of format=pt2")
    info = checkpoint.inspect(config.run, config.step)
    shape = checkpoint.infer_config(info)
    folder = out_folder(config, info)
    count = model.count(shape)["total"]
    disk, duration = (8, "about a minute") if config.format == "pt2" else (4, "seconds")
    print(
        f"exporting {info.folder.name}, step {info.step} ({info.stage}), {format_count(count)} parameters, as "
        f"{config.format} to {folder}: takes {duration}, up to {format_count(disk * count)}B on disk and "
        f"{format_count(2 * disk * count)}B of memory",
        flush=True,
    )
    start = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial")  # a stopped export leaves no folder that looks complete
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be made: {reason(error)}") from None
    WRITERS[config.format](config, partial, info, *read(config, info))
    partial.rename(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"  {path.relative_to(folder)}  {format_count(path.stat().st_size)}B")
    total = sum(path.stat().st_size for path in files)
    print(f"wrote {format_count(total)}B in {format_duration(time.perf_counter() - start)}")
    print(f"next: {NEXT[config.format].format(folder=folder)}")


def out_folder(config: Config, info: CheckpointInfo) -> Path:
    default = base_dir() / "exports" / f"{info.folder.name}_{config.format}"
    folder = Path(config.out).expanduser().absolute() if config.out else default
    if folder.exists():
        raise UserError(f"{folder} exists: delete it, or --set out=<another folder>")
    return folder


def read(config: Config, info: CheckpointInfo) -> tuple[TensorDict, Tokenizer | None]:
    """Return the parameters in the dtype to export, and the tokenizer if there is one."""
    from nanochat import tree

    params, *_ = checkpoint.load_params(info.folder / "checkpoints", step=info.step)
    shape = checkpoint.infer_config(info)
    has_tokenizer = tokenizer.TOKENS_FILE in info.files or config.format in ("hf", "pt2")  # these need one
    tok = checkpoint.load_tokenizer(info) if has_tokenizer else None
    if tok and config.format in ("hf", "pt2") and tok.vocab_size < shape.vocab_size:  # ids without a token
        shape = dataclasses.replace(shape, vocab_size=tok.vocab_size)
    name = "float32" if config.format == "pt2" and config.dtype == "auto" else config.dtype
    dtype = None if name == "auto" else distributed.DTYPES[name]
    flat = tree.flatten(params)
    for name, row in model.spec(shape).items():
        flat[name] = flat[name][: row.shape[0]].to(dtype if dtype and len(row.shape) > 1 else flat[name].dtype)
    return model.with_config(tree.unflatten(flat), shape), tok


def write_hf(config: Config, folder: Path, info: CheckpointInfo, params: TensorDict, tok: Tokenizer) -> None:
    checkpoint.huggingface.save(folder, params, tok, step=info.step, stage=info.stage)
    jsonl.write_atomic(folder / "README.md", card(info))


def write_safetensors(
    config: Config, folder: Path, info: CheckpointInfo, params: TensorDict, tok: Tokenizer | None
) -> None:
    checkpoint.tensor_files.save(folder, params, tok, step=info.step, stage=info.stage)


def write_reference(
    config: Config, folder: Path, info: CheckpointInfo, params: TensorDict, tok: Tokenizer | None
) -> None:
    checkpoint.convert.save_reference(folder, params, tok, step=info.step, stage=info.stage)


def write_pt2(config: Config, folder: Path, info: CheckpointInfo, params: TensorDict, tok: Tokenizer) -> None:
    from nanochat import tree
    from nanochat.infer import program

    placed = tree.map(lambda x: x.to(distributed.choose_device(config.device, 0)), params)
    context = config.context or model.config_of(params).sequence_len
    program.save(folder, placed, context, aot=config.aot)
    content = checkpoint.huggingface.tokenizer_json(tok)
    jsonl.write_atomic(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
    turn = "{input('> ')}" if info.stage == "base" else "<|user_start|>{input('> ')}<|user_end|><|assistant_start|>"
    jsonl.write_atomic(folder / "README.md", PROGRAM_CARD.replace("CONTEXT", str(context)).replace("PROMPT", turn))


WRITERS = {"hf": write_hf, "safetensors": write_safetensors, "reference": write_reference, "pt2": write_pt2}
BACK = "python launch.py --experiment=convert --set model={folder} --set name=<run> reads it back"
NEXT = {
    "hf": "transformers.AutoModelForCausalLM.from_pretrained('{folder}', trust_remote_code=True); see its README.md",
    "safetensors": BACK,
    "reference": BACK,
    "pt2": "{folder}/README.md has ten lines that chat with it",
}


def card(info: CheckpointInfo) -> str:
    """Return the model card: what it is, how to use it, and the numbers of the run and its ancestors."""
    runs = metrics.run_folder.ancestors(info.folder)
    kind = {"base": "base model, which continues text"}.get(info.stage, "chat model")
    prompt = CHAT if info.stage != "base" else COMPLETE
    sections = [metrics.report.results(runs), metrics.report.model_section(runs)]
    return CARD.format(name=info.folder.name, kind=kind, step=info.step, stage=info.stage, prompt=prompt) + "\n\n".join(
        ["", *sections, ""]
    )


PROGRAM_CARD = """\
# Two torch.export programs

`prefill(tokens (B, T), lengths (B,)) -> logits (B, V), cache` and `decode(tokens (B,), cache) -> logits (B, V), cache`,
for any number of rows. T is at least 2; shorter rows are padded on the right. In this folder:

```python
import torch
from tokenizers import Tokenizer

tok = Tokenizer.from_file("tokenizer.json")
prefill, decode = (torch.export.load(f"{name}.pt2").module() for name in ("prefill", "decode"))
ids = tok.encode(f"<|bos|>PROMPT").ids
logits, cache = prefill(torch.tensor([ids]), torch.tensor([len(ids)]))
while (token := logits.argmax(-1)).item() != tok.token_to_id("<|assistant_end|>") and cache["length"] < CONTEXT:
    print(tok.decode([token.item()]), end="", flush=True)
    logits, cache = decode(token, cache)
```

The calculator is not in these lines: where the model writes `<|python_start|>12*3<|python_end|>`, decode the tokens of
`<|output_start|>36<|output_end|>` before going on, or it invents the result.

A row has room for CONTEXT tokens. With *_aot.pt2: `torch._inductor.aoti_load_package`, which is called the same way.
"""
CHAT = """\
messages = [{"role": "user", "content": "What is 12*3?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
COMPLETE = """\
ids = [tokenizer.bos_token_id, *tokenizer("The standard library").input_ids]
inputs = {"input_ids": torch.tensor([ids])}"""
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat]
---

# {name}

A {kind}, trained with nanochat: step {step}, stage {stage}.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("<this folder>")
model = AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)
{prompt}
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

- Every document and conversation begins with `<|bos|>`, which the chat template adds and the tokenizer does not.
- Text that spells a special token is text, in messages too. Write special tokens as ids
  (`tokenizer.convert_tokens_to_ids("<|user_start|>")`), or pass `split_special_tokens=False`.
- The model calls its calculator as `<|python_start|>12*3<|python_end|>`. `generate` does not run it: insert
  `<|output_start|>36<|output_end|>` after the call, or let nanochat serve the model.
"""
