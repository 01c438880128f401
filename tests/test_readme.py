"""Every example of the READMEs runs, and every link and command in them names something that is there."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from nanochat.config import override

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
PAGES = {path: path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("nanochat/**/*.md")]}
RECIPES = [(ROOT / path).read_text("utf-8") for path in (".cloud/speedrun.yaml", ".docker/Dockerfile")]
COMMAND = re.compile(r"(?:torchrun|python)(?: --[\w-]+=\S+| \\\n)* *launch\.py(?:\\\n|[^`#\n])*")
COMMANDS = sorted({command for text in [*PAGES.values(), *RECIPES] for command in COMMAND.findall(text)})
# In tables: what goes behind --experiment=.
COMMANDS += [
    f"python launch.py --experiment={words}"
    for words in re.findall(r"\| `(\w+ --set [^`]*)`", PAGES[ROOT / "README.md"])
]
LINKS = [(path, link) for path, text in PAGES.items() for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)]


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


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.relative_to(ROOT)}:{link}" for page, link in LINKS])
def test_links_exist(page: Path, link: str):
    assert (page.parent / link).exists()


def test_cloud_recipe_is_complete():
    recipe = yaml.safe_load(RECIPES[0])
    assert recipe["envs"]["BUCKET"] is None  # required
    assert set(re.findall(r"\$\{?([A-Z_]+)", RECIPES[0])) == {*recipe["envs"], "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert all((ROOT / word).exists() for word in re.findall(r"sky jobs launch (\S+)", RECIPES[0]))
