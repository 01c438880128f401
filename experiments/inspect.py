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
about 5 s for a batch of the quickstart on one CPU core, at depth 20 about as long as five steps on the same GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import _replay
from nanochat import checkpoint, distributed, jsonl, metrics, model, tasks
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
        dtype: dtype of the computation; auto: bfloat16 where a GPU has it, else float32, also in place of float16.
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
    if runtime.compute_dtype == distributed.DTYPES["float16"]:  # small gradients would vanish without a loss scale
        runtime = dataclasses.replace(runtime, compute_dtype=distributed.DTYPES["float32"])
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
    chunk, needed = chunk_that_fits(loaded, runtime)
    flops = len(documents) * length * model.flops_per_token(loaded.config)
    seconds = 3 * flops / distributed.peak_flops(runtime.device, runtime.compute_dtype)[0]
    print(f"read in {format_duration(time.monotonic() - began)}, and equal to what the run recorded: ", end="")
    print(f"{rows} rows of {length} tokens, {len(documents)} documents")
    print(f"a gradient of each: about {format_duration(seconds)}, {needed / 2**30:.1f} GiB", flush=True)
    wanted = text_batch(config, loaded, runtime) if config.prompt else None
    sums = measure(loaded, batch, documents, wanted, chunk)
    report(config, loaded, number, batch, documents, sums)


def choose_step(folder: Path, number: int | None) -> int:
    """Return the step to show: the one that is set, if the run has it, or that of the largest spike."""
    rows = [row for row in metrics.logger.read(folder) if "train/loss" in row]
    last = metrics.run_folder.read_run(folder).last_step
    if number is None and not rows:
        raise UserError(f"run {folder.name} has no losses on record: set step")
    if number is None:
        spike = max(rows, key=lambda row: finite_or_inf(row["train/loss"] - row["train/loss_ema"]))
        loss, mean = spike["train/loss"], spike["train/loss_ema"]
        print(f"largest spike in metrics.jsonl: step {spike['step']}, loss {loss:.4f}, running mean {mean:.4f}")
        return spike["step"]
    if number > last + 1:  # the one after the last may have failed
        raise UserError(f"step={number}: {folder.name} has steps 1 to {last}")
    return number


def finite_or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


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

    shape, size, length = loaded.config, tree.nbytes(loaded.params), loaded.config.sequence_len
    # Kept for the backward pass of a layer, uncompiled: about 60 numbers per token and channel.
    one = 2 * size + 4 * length * 60 * shape.n_layer * shape.n_embd
    one += 4 * min(length, CHUNK_TOKENS) * 5 * shape.vocab_size
    free = distributed.free_bytes(runtime.device)
    if 2 * size + one > free:
        needed, free = (2 * size + one) / 2**30, free / 2**30
        raise UserError(f"a gradient of {loaded.name} takes {needed:.1f} GiB, and {free:.1f} are free")
    chunk = min(MAX_CHUNK, max(free // 2 // one, 1))
    return chunk, 2 * size + chunk * one


def text_batch(config: Config, loaded: Pretrained, runtime: Runtime) -> dict[str, Tensor]:
    """Return prompt and answer as a batch of one row whose loss is the mean over the answer, or over a lone prompt."""
    import torch

    from nanochat.data import chat_format

    tok, prompt, answer = loaded.tokenizer, str(config.prompt), config.answer
    if answer and loaded.stage != "base":
        ids, mask = chat_format.render(tok, tasks.qa_conversation(prompt, answer))
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
) -> dict[str, float]:
    """Add "loss", "grad_norm", "share" and (of a text `wanted`) "effect" to the documents; return those of the batch.

    The effect is the product of the gradient with that of the text's mean loss, "text_loss".
    """
    import torch

    from nanochat import tree

    params, names = loaded.params, ("inputs", "targets", "weights")
    compute, device = model.Compute(params["wte"].dtype), params["wte"].device
    loss_fn = functools.partial(model.loss.next_token, config=loaded.config, compute=compute, chunk_tokens=CHUNK_TOKENS)
    gradient = torch.func.grad_and_value(lambda params, batch: loss_fn(params, batch)[0])

    def dot(a: TensorDict, b: TensorDict) -> Tensor:
        return torch.stack([(x.float() * y.float()).sum() for x, y in zip(tree.leaves(a), tree.leaves(b))]).sum()

    def of_batch(batch: dict[str, Tensor]) -> tuple[TensorDict, float]:
        total, value = tree.map(lambda p: torch.zeros_like(p, dtype=torch.float32), params), 0.0
        for part in zip(*(batch[name].split(chunk) for name in names)):
            grads, loss = gradient(params, dict(zip(names, part)))
            total, value = tree.map(torch.add, total, grads), value + float(loss)
        return total, value

    total, loss = of_batch(batch)
    text, text_loss = of_batch(wanted) if wanted else (None, 0.0)
    sums = {"loss": loss, "grad_norm": float(dot(total, total).sqrt()), "text_loss": text_loss}
    sums |= {} if text is None else {"effect": float(dot(total, text))}

    def of_document(*row: Tensor) -> Tensor:
        grads, loss = gradient(params, {name: x[None] for name, x in zip(names, row)})
        return torch.stack([loss, *(dot(grads, other) for other in (grads, total, text) if other is not None)])

    # On the CPU, torch's attention is called once for each document.
    warnings.filterwarnings("ignore", "There is a performance drop")
    columns = torch.arange(batch["inputs"].shape[1], device=device)
    with metrics.progress.Bar(len(documents), label="gradients", unit="document") as bar:
        for first in range(0, len(documents), chunk):
            group = documents[first : first + chunk]
            row, start, stop = (torch.tensor([d[k] for d in group], device=device) for k in ("row", "start", "stop"))
            weights = batch["weights"][row] * ((columns >= start[:, None]) & (columns < stop[:, None]))
            numbers = torch.func.vmap(of_document)(batch["inputs"][row], batch["targets"][row], weights)
            for document, weight, (loss, square, along, *effect) in zip(
                group, weights.sum(1).tolist(), numbers.tolist()
            ):
                share = along / max(sums["grad_norm"] ** 2, 1e-30)
                document |= {"loss": loss / weight, "grad_norm": square**0.5, "share": share}
                document |= {"effect": effect[0]} if effect else {}
            bar.update(len(group))
    return sums


def report(
    config: Config, loaded: Pretrained, number: int, batch: dict[str, Tensor], documents: list[dict[str, Any]],
    sums: dict[str, float],
) -> None:  # fmt: skip
    """Print the batch and its documents in their order, and write all of these into the run's folder."""
    key = {"auto": "effect" if config.prompt else "grad_norm", "grad": "grad_norm"}.get(config.sort, config.sort)
    inputs, targets = batch["inputs"].tolist(), batch["targets"].tolist()
    for document in documents:
        row, start, stop = document["row"], document["start"], document["stop"]
        last = targets[row][-1:] if stop == len(inputs[row]) and targets[row][-1] != model.IGNORE else []
        document["tokens"] = [*inputs[row][start:stop], *last]
        document["text"] = loaded.tokenizer.decode(document["tokens"][1:])
    documents = sorted(documents, key=lambda document: finite_or_inf(document[key]), reverse=key != "row")
    printed, half = documents[: config.show], config.show // 2
    if key == "effect" and len(documents) > config.show and half:  # both ends: what helps and what hurts
        printed[-half:] = documents[-half:]
    rows = (row for row in metrics.logger.read(loaded.folder) if row["step"] == number and "train/loss" in row)
    recorded = next(rows, {})
    for name, title in (("loss", "loss of the batch"), ("grad_norm", "norm of its gradient")):
        before = f" ({recorded[f'train/{name}']:.4f} in training)" if recorded else ""
        print(f"{title} {sums[name]:.4f}{before}")
    form = {"loss": "{:.3f}", "grad_norm": "{:.4f}", "share": "{:.1%}"}
    if config.prompt:
        form["effect"] = "{:+.2e}"
        print(f"loss of the text {sums['text_loss']:.4f}; effect of the whole batch {sums['effect']:+.2e}: ", end="")
        print("what has a positive effect lowers the text's loss, what has a negative one raises it")
    lines = [["row", "columns", *form]]
    for document in printed:
        numbers = [text.format(document[name]) for name, text in form.items()]
        lines.append([f"{document['row']}", f"{document['start']}-{document['stop'] - 1}", *numbers])
    texts = [f"{d['text'][: config.chars] + '…' * (len(d['text']) > config.chars)!r}" for d in printed]
    print("\n".join(f"{head}  {text}" for head, text in zip(table(lines).splitlines(), ["text", *texts])))
    path = loaded.folder / "inspect" / f"step_{number}.jsonl"
    jsonl.write_atomic(path, "".join(f"{json.dumps(document)}\n" for document in documents))
    print(f"{len(printed)} of {len(documents)} documents, by {key}; all of them, with their tokens: {path}")
