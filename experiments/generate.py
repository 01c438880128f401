"""Complete plain text with a trained model: one prompt, streamed, or a file of prompts into a file of completions.

    python launch.py --experiment=generate --set prompt="The capital of France is"
    python launch.py --experiment=generate --set prompt=- --set samples=3 < beginning.txt
    python launch.py --experiment=generate --set prompts=prompts.jsonl --set output=out.jsonl --set slots=32

The text follows <|bos|> as in pretraining: no conversation, so this is the way to use a base model. The completion goes
to standard output, all else to standard error.

A file of prompts has one a line: as JSON where its name ends in .jsonl (a string, or an object with "prompt"), else as
it stands. The output has one JSON object a line, in the order of the prompts: what the prompt's object had, and prompt,
sample, completion, finish ("stop" or "length"), tokens, seed. Finished rows make room for the next prompts at once.
A completion's seed is `seed` plus its number in the output: the prompt alone with that seed gives it again (where two
tokens are equally likely to within the rounding of matrix products, which depends on the load, either may come).

A few seconds to start; with many prompts, compile=true takes up to a minute more and is faster from then on.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from experiments import chat
from nanochat import checkpoint, infer
from nanochat.config import Device, Dtype, UserError
from nanochat.metrics import progress

if TYPE_CHECKING:
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config:
    """What to complete, and how.

    Attributes:
        prompt: the text, which may be empty; `-` reads it from standard input, without its last line break.
        prompts: a file of them. output: where the completions go as JSON lines; none: to standard output.
        samples: of each prompt. slots: completed at once.
        run: a run's name, or the path of its folder; none: the run that was saved last. step: none: its newest.
        temperature, top_k: of the sampling; temperature 0 is greedy, top_k 0 takes all tokens in.
        max_tokens: of a completion. seed: of the first completion; each other one has the next.
        compile: by torch.compile. device, dtype: auto, or as in `runtime.create`.
    """

    prompt: str | None = None
    prompts: Path | None = None
    output: Path | None = None
    samples: int = 1
    slots: int = 16
    run: str | None = None
    step: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 256
    seed: int = 42
    compile: bool = False
    device: Device = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        chat.check_settings(self, temperature=0, top_k=0, max_tokens=1, samples=1, slots=1)


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Read the prompts, load the model, complete."""
    if runtime.world_size > 1:
        raise UserError("generate runs in one process: start it with python, not torchrun")
    if (config.prompt is None) == (config.prompts is None):
        raise UserError('set either a prompt, --set prompt="Once upon a time", or a file of them, --set prompts=…')
    chat.forgive_encodings()
    if config.prompts is not None:
        rows = list(read_prompts(config.prompts))
    else:
        rows = [{"prompt": chat.read_prompt(config.prompt)}]
    bot, decoder = chat.load(config, runtime, slots=min(config.slots, len(rows) * config.samples))
    screen = chat.Screen(sys.stdout, sys.stderr)
    screen.note(checkpoint.describe_model(bot))
    requests = as_requests(config, bot.tokenizer, rows, decoder.context)
    events = infer.run(decoder, requests)
    with chat.quiet_pipe():
        if config.prompts is not None or config.output is not None:
            write(config, bot.tokenizer, rows, requests, events)
        elif config.samples == 1:
            stream(bot.tokenizer, events)
        else:
            for i, ids, finish in ordered(events):
                text = chat.printable(said(bot.tokenizer, ids, finish), sys.stdout)
                print(f"--- sample {i + 1} of {config.samples}\n{text}", flush=True)


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield {"prompt": text, …} for each line of a file that is not blank.

    Raises:
        UserError: there is no such file, no prompt in it, or a line that is none (with its number).
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"prompts={path}: has no prompt in it")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield {"prompt": line.removesuffix("\r")}
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"prompts={path} line {number}: is no JSON ({error})") from None
        row = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'prompts={path} line {number}: expected a string, or an object with a "prompt"')
        yield row


def as_requests(config: Config, tok: Tokenizer, rows: Sequence[dict[str, Any]], context: int) -> list[infer.Request]:
    """Return the requests, all samples of a prompt beside each other.

    Raises:
        UserError: a prompt does not fit into the context; nothing has been completed then.
    """
    requests = []
    for number, ids in enumerate(tok.encode_batch([row["prompt"] for row in rows]), start=1):
        if len(ids) + 1 >= context:
            which = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt"
            raise UserError(f"{which} has {len(ids) + 1} tokens, the model's context holds {context}: shorten it")
        for _ in range(config.samples):
            seed, prompt = config.seed + len(requests), (tok.bos, *ids)
            requests.append(infer.Request(prompt, config.max_tokens, config.temperature, config.top_k, seed))
    return requests


def stream(tok: Tokenizer, events: Iterable[infer.Event]) -> None:
    """Print the one completion as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for event in events:
        text = "" if event.finish == "stop" else decoder.decode(tok.decode_bytes([event.token]))
        text += decoder.decode(b"", final=True) if event.finish else ""
        print(chat.printable(text, sys.stdout), end="\n" if event.finish else "", flush=True)


def ordered(events: Iterable[infer.Event]) -> Iterator[tuple[int, list[int], str]]:
    """Yield (index, tokens, how it ended) of each request, in the order of the requests, as soon as that allows."""
    tokens: dict[Any, list[int]] = {}
    ended: dict[Any, str] = {}
    following = 0
    for event in events:
        tokens.setdefault(event.key, []).append(event.token)
        if event.finish:
            ended[event.key] = event.finish
        while following in ended:
            yield following, tokens.pop(following), ended.pop(following)
            following += 1


def said(tok: Tokenizer, ids: Sequence[int], finish: str) -> str:
    """Return a completion's text; the token that ended it by itself is no part of it."""
    return tok.decode(ids[:-1] if finish == "stop" else ids)


def write(
    config: Config,
    tok: Tokenizer,
    rows: Sequence[dict[str, Any]],
    requests: Sequence[infer.Request],
    events: Iterable[infer.Event],
) -> None:
    """Write a JSON line for each completion, in the order of the requests."""
    with written(config.output) as file, progress.bar(len(requests), label="generate", unit="completion") as bar:
        for i, ids, finish in ordered(events):
            row = rows[i // config.samples] | {
                "sample": i % config.samples,
                "completion": said(tok, ids, finish),
                "finish": finish,
                "tokens": len(ids),
                "seed": requests[i].seed,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(1)


@contextlib.contextmanager
def written(path: Path | None) -> Iterator[TextIO]:
    """Give a file to write `path` by, which takes its name when it is complete; standard output for None.

    Raises:
        UserError: it cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"output={path}: cannot be written ({error.strerror}); what there is lies in {partial}"
        ) from None
    except KeyboardInterrupt:
        print(f"completions so far: {partial}", file=sys.stderr)
        raise
