"""Every example of the README runs, and every link and command in it names something that is there."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from nanochat.config import override

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = sorted(set(re.findall(r"(?:torchrun|python)(?: --[\w-]+=\S+)* launch\.py[^`#\n]*", TEXT)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_python_examples_run():
    examples = blocks("python")
    assert len(examples) >= 2
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    assert float(str(namespace["noise"].item())) > 0  # pyright: ignore[reportAttributeAccessIssue]


def test_examples_run_on_a_checkpoint(base: Path):
    tiny_run.save_run(base, "quickstart")
    namespace: dict[str, Any] = {}
    exec(next(b for b in blocks("python notest") if "model.apply" in b), namespace)
    assert namespace["logits"].shape[0] == 1 and namespace["loaded"].config == tiny_run.CONFIG
    exec(next(b for b in blocks("python notest") if "infer.run" in b), namespace)
    assert namespace["event"].finish


def test_example_of_an_experiment_is_one():
    namespace: dict[str, object] = {}
    exec(next(b for b in blocks("python notest") if "def config" in b), namespace)
    made = namespace["config"]()  # pyright: ignore[reportCallIssue]
    assert made.depth == 16 and callable(namespace["run"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command: str):
    words = shlex.split(command)[2:]
    named = [word.partition("=")[2] for word in words if word.startswith("--experiment=")]
    if named:
        config = importlib.import_module(f"experiments.{named[0]}").config()
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        override(config, [s for s in settings if not s.endswith("=")])
        assert "--resume" not in words or hasattr(config, "resume")


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_links_exist(link: str):
    assert (ROOT / link).exists()
