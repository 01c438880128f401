"""The torch.export programs: equal to the model for any batch and length, in a process without this project."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from small_model import WINDOWED, random_params

from experiments import export
from nanochat import distributed, infer, model
from nanochat.config import UserError
from nanochat.infer import program
from nanochat.model import Params

CONFIG = dataclasses.replace(WINDOWED, vocab_size=tiny_run.TOK.vocab_size, n_layer=2)


def make_params() -> Params:
    """Return random parameters that never call a tool, which the engine would answer, nor stop."""
    params = random_params(CONFIG)
    params["lm_head"][tiny_run.TOK.bos :] = 0
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tiny_run.save_run(base, config=CONFIG, params=make_params(), stage="sft")
        export.run(export.Config(run="bot", format="pt2", context=200), distributed.init("cpu"))
    return base / "exports" / "bot_pt2"


BARE = """
import sys
for name in ("nanochat", "transformers", "tensordict", "numpy"):
    sys.modules[name] = None
import torch
prefill, decode = (torch.export.load(f"{name}.pt2").module() for name in ("prefill", "decode"))
results = []
for tokens, lengths, steps in torch.load("inputs.pt"):
    logits, cache = prefill(tokens, lengths)
    first, drawn = logits, []
    for _ in range(steps):
        drawn.append(logits.argmax(-1))
        logits, cache = decode(drawn[-1], cache)
    results.append((first, torch.stack(drawn, 1), logits))
torch.save(results, "outputs.pt")
"""


@pytest.mark.slow
def test_greedy_tokens_in_a_bare_torch_process(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for rows, longest in ((1, 2), (3, 40), (2, 150)):  # beyond the short window too
        lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
        lengths[0] = longest
        cases.append((torch.randint(0, 256, (rows, longest), generator=generator), lengths, 20))
    torch.save(cases, folder / "inputs.pt")
    subprocess.run([sys.executable, "-I", "-c", BARE], cwd=folder, check=True, timeout=300)
    engine = infer.start(make_params(), CONFIG, tiny_run.TOK, slots=4, compile=False)
    for (tokens, lengths, steps), (first, drawn, last) in zip(cases, torch.load(folder / "outputs.pt"), strict=True):
        prompts = [row[:n].tolist() for row, n in zip(tokens, lengths)]
        for row, prompt in enumerate(prompts):
            logits = model.apply(make_params(), torch.tensor([prompt + drawn[row].tolist()]))[0]
            assert (first[row] - logits[len(prompt) - 1]).abs().max() < 1e-5
            assert (last[row] - logits[-1]).abs().max() < 1e-5
        requests = [infer.Request(tuple(prompt), max_tokens=steps, temperature=0) for prompt in prompts]
        assert [c.tokens for c in infer.complete(engine, requests)] == drawn.tolist()


def test_the_ten_lines_chat(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 10
    end = tiny_run.TOK.special("<|assistant_end|>")
    programs = {"prefill": program.Prefill(make_params(), 200), "decode": program.Decode(make_params())}

    class Loaded:
        """A program that answers with the end after five tokens, as an untrained model does not."""

        def __init__(self, path: str) -> None:
            self.run, self.count = programs[path.removesuffix(".pt2")], 0

        def module(self) -> Any:
            return self

        def __call__(self, *args: Any) -> Any:
            logits, cache = self.run(*args)
            self.count += 1
            if self.count == 5:
                logits[:, end] = 100
            return logits, cache

    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.export, "load", Loaded)
    monkeypatch.setattr("builtins.input", lambda _: "the text")
    exec(compile(lines, "README.md", "exec"), {})
    tok = tiny_run.TOK
    ids = [tok.bos, tok.special("<|user_start|>"), *tok.encode("the text"), tok.special("<|user_end|>")]
    engine = infer.start(make_params(), CONFIG, tok, slots=1, compile=False)
    request = infer.Request((*ids, tok.special("<|assistant_start|>")), max_tokens=5, temperature=0)
    (done,) = infer.complete(engine, [request])
    assert capsys.readouterr().out == "".join(tok.decode([token]) for token in done.tokens)


def test_a_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context=2561: expected 2 … 2560, the limit of the model"):
        program.save(tmp_path, make_params(), 2561)
    assert not list(tmp_path.iterdir())


def test_folder_says_its_context(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text()) == {"context": 200, "vocab_size": CONFIG.vocab_size}
