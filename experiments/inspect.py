"""Show what a training step saw: its documents, each with its loss and the norm of its gradient.

    python launch.py --experiment=inspect --set run=d20 --set step=1234
    python launch.py --experiment=inspect --set run=d20                       # the step of the largest loss spike
    python launch.py --experiment=inspect --set run=quickstart_sft --set step=90 --set sort=loss
    python launch.py --experiment=inspect --set run=d20 --set step=1234 --set prompt="The capital of France is Rome"

The first thing to look at after a loss spike. A step has the number that metrics.jsonl gives it: its batch is the one
whose loss that row has, and a run that stopped with "step 1234: the loss is not finite" failed on the batch of 1235.
The batch is read again, exactly, from the last checkpoint before the step or from the beginning of the data, and
compared with what the run recorded. For pretraining, mid-training and SFT; with any number of ranks.

A row packs several documents. The gradient of a document is that of its part of the batch's loss, so those of all
documents add up to the batch's; `share` is how much of the batch's gradient points along the document's, 100% in all.

With `prompt`, `effect` is by how much the document helped that text: a step of gradient descent of size η on the
document alone lowers the text's loss by η·effect; a negative one raises it (TracIn, arXiv 2002.08484). To first order,
and without what Muon and AdamW make of a gradient: what counts is sign and order.

Writes all documents to inspect/step_<n>.jsonl in the run's folder. Takes a gradient of a whole row for each document:
a batch of the quickstart about 15 s on one CPU core, of d20 as long as about five of its steps on the same GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal

from experiments import _replay
from nanochat import checkpoint, distributed, jsonl, metrics, model
from nanochat.config import Device, Dtype, NonNegativeInt, PositiveInt, Settings, UserError
from nanochat.text import format_duration, table

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

    from nanochat.checkpoint import Pretrained
    from nanochat.distributed import Runtime

MAX_CHUNK = 16  # documents whose gradients are computed together
CHUNK_TOKENS = 1024  # whose logits are in memory at once, for each of them


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Which step to show.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. name@100: its step 100.
        step: as metrics.jsonl counts them; none: the one whose loss is highest above the running mean.
        at: checkpoint to compute losses and gradients with; none: the one nearest to the step.
        sort: what the documents are sorted by: grad, the norm of their gradients; loss; effect, on the prompt; or
            row, as they lie in the batch.
        prompt: a text, to see which documents help or hurt it.
        answer: what follows the prompt, after a space; then only its loss counts. A chat model gets a conversation.
        show: documents to print.
        chars: to print of each document.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
        dtype: dtype of the computation; auto: bfloat16 on GPUs from Ampere on, else float32.
    """

    run: str | None = None
    step: PositiveInt | None = None
    at: NonNegativeInt | None = None
    sort: Literal["auto", "grad", "loss", "effect", "row"] = "auto"
    prompt: str | None = None
    answer: str | None = None
    show: PositiveInt = 20
    chars: PositiveInt = 60
    device: Device = "auto"
    dtype: Dtype = "auto"


config = Config


def run(config: Config, runtime: Runtime) -> None:
    distributed.require_single(runtime, "inspect")
    if not config.prompt and (config.answer or config.sort == "effect"):
        raise UserError(f"{'answer' if config.answer else 'sort=effect'}: set prompt too")
    name, number = checkpoint.split_step(config.run, config.step)
    folder = checkpoint.find_run(name)
    number = choose_step(folder, number)
    saved = checkpoint.steps(folder / "checkpoints")
    at = min(saved, key=lambda step: abs(step - (number - 1))) if config.at is None else config.at
    print(f"step {number} of {folder.name}, with the model of step {at}: reading its batch", flush=True)
    began = time.monotonic()
    step = next(_replay.steps_after(folder, number - 1, runtime.device), None)
    if step is None:
        raise UserError(f"step={number}: the data of {folder.name} ends before it")
    loaded = checkpoint.load(folder, step=at, device=runtime.device, dtype=runtime.compute_dtype)
    batch = _replay.with_weights(step.batch)
    documents = find_documents(batch, loaded.tokenizer.bos)
    rows, length = batch["inputs"].shape
    print(f"read in {format_duration(time.monotonic() - began)}, and equal to what the run recorded")
    flops = len(documents) * length * model.flops_per_token(loaded.config)
    seconds = 3 * flops / distributed.peak_flops(runtime.device, runtime.compute_dtype)[0]
    chunk, needed = chunk_that_fits(loaded, runtime)
    print(
        f"{rows} rows of {length} tokens, {len(documents)} documents; a gradient of each: about "
        f"{format_duration(seconds)} and {needed / 2**30:.1f} GiB",
        flush=True,
    )
    wanted = None if config.prompt is None else text_batch(config, loaded, runtime)
    found, sums = measure(loaded, batch, documents, wanted, chunk)
    report(config, loaded, step, batch, found, sums)


def choose_step(folder: Any, number: int | None) -> int:
    """Return the step to show: the one that is set, if the run has it, or that of the largest spike."""
    rows = [row for row in metrics.logger.read(folder) if "train/loss" in row]
    last = metrics.run_folder.read_run(folder).last_step
    if number is None:
        if not rows:
            raise UserError(f"run {folder.name} has no losses on record: set step")
        spike = max(rows, key=lambda row: row["train/loss"] - row["train/loss_ema"])
        print(f"largest spike: step {spike['step']}, loss {spike['train/loss']:.4f}", end=", ")
        print(f"running mean {spike['train/loss_ema']:.4f} (of the steps in metrics.jsonl)")
        return spike["step"]
    if not 1 <= number <= last + 1:  # the one after the last may have failed
        raise UserError(f"step={number}: {folder.name} has steps 1 to {last}")
    return number


def find_documents(batch: dict[str, Tensor], bos: int) -> list[dict[str, Any]]:
    """Return {"row", "start", "stop", "targets": number of them} of each document with a loss, as columns of inputs."""
    documents = []
    for row, (inputs, weights) in enumerate(zip(batch["inputs"].cpu(), batch["weights"].cpu())):
        starts = (inputs == bos).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(inputs)]):
            if targets := int((weights[start:stop] > 0).sum()):
                documents.append({"row": row, "start": start, "stop": stop, "targets": targets})
    return documents


def chunk_that_fits(loaded: Pretrained, runtime: Runtime) -> tuple[int, int]:
    """Return how many gradients to compute at once, and the bytes that takes."""
    from nanochat import tree

    shape, length = loaded.config, loaded.config.sequence_len
    # Kept for the backward pass of a layer, uncompiled: about 60 numbers per token and channel.
    one = 2 * tree.nbytes(loaded.params) + 4 * 60 * length * shape.n_layer * shape.n_embd
    one += 4 * 5 * min(length, CHUNK_TOKENS) * shape.vocab_size
    free = distributed.free_bytes(runtime.device)
    if 2 * tree.nbytes(loaded.params) + one > free:
        raise UserError(
            f"a gradient of {loaded.name} takes {one / 2**30:.1f} GiB beside the model, and {free / 2**30:.1f} are free"
        )
    chunk = min(MAX_CHUNK, max(free // 2 // one, 1))
    return chunk, chunk * one + 2 * tree.nbytes(loaded.params)


def text_batch(config: Config, loaded: Pretrained, runtime: Runtime) -> dict[str, Tensor]:
    """Return prompt and answer as a batch of one row whose loss is the mean over the answer, or over a lone prompt."""
    import torch

    from nanochat.data import chat_format

    tok, prompt, answer = loaded.tokenizer, str(config.prompt), config.answer
    if answer and loaded.stage != "base":
        roles = (("user", prompt), ("assistant", answer))
        messages = [{"role": role, "content": text} for role, text in roles]
        ids, mask = chat_format.render(tok, {"messages": messages})
    else:
        first = [tok.bos, *tok.encode(prompt)]
        rest = tok.encode(f" {answer}") if answer else []
        ids, mask = [*first, *rest], [not answer] * len(first) + [True] * len(rest)
    if not 2 <= len(ids) <= loaded.config.sequence_len + 1:
        raise UserError(f"prompt: {len(ids) - 1} tokens, and the context has {loaded.config.sequence_len}")
    row, counted = torch.tensor([ids], device=runtime.device), torch.tensor([mask[1:]], device=runtime.device).bool()
    return _replay.with_weights({"inputs": row[:, :-1], "targets": row[:, 1:].masked_fill(~counted, model.IGNORE)})


def measure(
    loaded: Pretrained,
    batch: dict[str, Tensor],
    documents: list[dict[str, Any]],
    wanted: dict[str, Tensor] | None,
    chunk: int,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the documents with "loss", "grad_norm", "share" and (of a text `wanted`) "effect", and sums of the batch.

    The effect is the product of the document's gradient with that of the text's mean loss.
    """
    import torch

    from nanochat import tree

    params, compute = loaded.params, model.Compute(loaded.params["wte"].dtype)
    loss_fn = functools.partial(model.loss.next_token, config=loaded.config, compute=compute, chunk_tokens=CHUNK_TOKENS)
    gradient = torch.func.grad_and_value(lambda params, batch: loss_fn(params, batch)[0])

    def dot(a: TensorDict, b: TensorDict) -> Tensor:
        products: Any = ((x.float() * y.float()).sum() for x, y in zip(tree.leaves(a), tree.leaves(b)))
        return sum(products)

    def of_batch(batch: dict[str, Tensor]) -> tuple[TensorDict, float]:
        total, value = tree.map(torch.zeros_like, params), 0.0
        for part in zip(*(batch[key].split(chunk) for key in ("inputs", "targets", "weights"))):
            grads, loss = gradient(params, dict(zip(("inputs", "targets", "weights"), part)))
            total, value = tree.map(torch.add, total, grads), value + float(loss)
        return total, value

    total, loss = of_batch(batch)
    text, text_loss = of_batch(wanted) if wanted else (None, 0.0)
    sums = {"loss": loss, "grad_norm": float(dot(total, total).sqrt()), "text_loss": text_loss}
    sums["effect"] = float(dot(total, text)) if text is not None else 0.0

    def of_document(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        one = {"inputs": inputs[None], "targets": targets[None], "weights": weights[None]}
        grads, loss = gradient(params, one)
        products = [dot(grads, other) for other in (grads, total, *([text] if text is not None else []))]
        return torch.stack([loss, *products])

    # torch's attention on the CPU is called once for each document.
    warnings.filterwarnings("ignore", "There is a performance drop")
    numbers = []
    rows = torch.tensor([document["row"] for document in documents], device=params.device)
    columns = torch.arange(batch["inputs"].shape[1], device=rows.device)
    bounds = torch.tensor([[d["start"], d["stop"]] for d in documents], device=rows.device)
    with metrics.progress.Bar(len(documents), label="gradients", unit="document") as bar:
        for part, edges in zip(rows.split(chunk), bounds.split(chunk)):
            inside = (columns >= edges[:, :1]) & (columns < edges[:, 1:])
            weights = batch["weights"][part] * inside
            numbers += torch.func.vmap(of_document)(batch["inputs"][part], batch["targets"][part], weights).tolist()
            bar.update(len(part))
    found = []
    for document, (loss, square, along, *effect) in zip(documents, numbers):
        row, start, stop = document["row"], document["start"], document["stop"]
        weight = float(batch["weights"][row, start:stop].sum())
        values = {"loss": loss / weight, "grad_norm": square**0.5, "share": along / sums["grad_norm"] ** 2}
        found.append({**document, **values, **({"effect": effect[0]} if effect else {})})
    return found, sums


def report(
    config: Config,
    loaded: Pretrained,
    step: _replay.Step,
    batch: dict[str, Tensor],
    found: list[dict[str, Any]],
    sums: dict[str, float],
) -> None:
    """Print the documents in their order, and write all of them into the run's folder."""
    key = {"auto": "effect" if config.prompt else "grad_norm", "grad": "grad_norm"}.get(config.sort, config.sort)
    tok, inputs, targets = loaded.tokenizer, batch["inputs"].tolist(), batch["targets"].tolist()
    for document in found:
        row, start, stop = document["row"], document["start"], document["stop"]
        last = [targets[row][-1]] if stop == len(inputs[row]) and targets[row][-1] != model.IGNORE else []
        document["tokens"] = [*inputs[row][start:stop], *last]
        document["text"] = tok.decode(document["tokens"][1:])
    ordered = sorted(found, key=lambda document: document[key], reverse=key != "row")
    first = -(-config.show // 2) if key == "effect" else config.show  # both ends: what helps and what hurts
    printed = (
        ordered if len(ordered) <= config.show else [*ordered[:first], *ordered[first - config.show or len(ordered) :]]
    )
    rows = (row for row in metrics.logger.read(loaded.folder) if row["step"] == step.number and "train/loss" in row)
    recorded = next(rows, {})
    for name, title in (("loss", "loss of the batch"), ("grad_norm", "norm of its gradient")):
        before = f" ({recorded[f'train/{name}']:.4f} in training)" if f"train/{name}" in recorded else ""
        print(f"{title} {sums[name]:.4f}{before}")
    if config.prompt:
        print(f"loss of the text {sums['text_loss']:.4f}; effect of the whole batch {sums['effect']:+.3g}: ", end="")
        print("a document with a positive effect lowers the text's loss, one with a negative effect raises it")
    columns = ("loss", "grad_norm", "share", *(["effect"] if config.prompt else []))
    form = {"loss": "{:.3f}", "grad_norm": "{:.4f}", "share": "{:.1%}", "effect": "{:+.2e}"}
    lines = [["row", "columns", *columns]]
    lines += [
        [f"{d['row']}", f"{d['start']}-{d['stop'] - 1}", *(form[name].format(d[name]) for name in columns)]
        for d in printed
    ]
    heads = table(lines).splitlines()
    for head, document in zip(heads, [None, *printed]):
        text = document["text"] if document else ""
        shown = text[: config.chars] + "…" * (len(text) > config.chars)
        print(head if document is None else f"{head}  {shown!r}")
    path = loaded.folder / "inspect" / f"step_{step.number}.jsonl"
    jsonl.write_atomic(path, "".join(f"{json.dumps(document)}\n" for document in ordered))
    print(f"{len(printed)} of {len(found)} documents, by {key}; all of them with text and tokens: {path}")
