"""The report of a run and its ancestors: one markdown page, with its charts as SVG files beside it.

Everything is read from the run folders. What is missing is a dash or a missing section, so a report can be written for
a run that is still training, was never evaluated, or has lost a file.
"""

import contextlib
import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat import jsonl, model, tree
from nanochat.metrics import logger, noise_scale, plots, run_folder
from nanochat.metrics.machine import versions
from nanochat.metrics.run_folder import RunInfo
from nanochat.text import format_count, format_duration

ROOT = Path(__file__).resolve().parents[2]
# The first rows of the results table; other metrics follow.
NAMED = {
    "core/CORE": "CORE",
    "chat/ARC-Easy": "ARC-Easy",
    "chat/ARC-Challenge": "ARC-Challenge",
    "chat/MMLU": "MMLU",
    "chat/GSM8K": "GSM8K",
    "chat/HumanEval": "HumanEval",
    "chat/SpellingBee": "SpellingBee",
    "chat/ChatCORE": "ChatCORE",
    "val/bpb": "bits per byte",
}


class Sample(NamedTuple):
    """What a stage's model wrote: a base model's completion of a prompt, another's answer to it."""

    stage: str
    prompt: str
    text: str


def write(
    runs: Sequence[RunInfo],
    machine: Mapping[str, str],
    dollars_per_hour: float | None,
    samples: Sequence[Sample] = (),
    *,
    seconds: Mapping[str, float] | None = None,
    root: Path = ROOT,
) -> Path:
    """Write report.md and its charts into the folder of the last of `runs`; return the path of report.md.

    Args:
        runs: the oldest first, as from `run_folder.ancestors`.
        machine: facts about it by name.
        dollars_per_hour: of its GPUs; None without one.
        seconds: what else took time -> seconds.
        root: the folder of the code.
    """
    folder = runs[-1].folder
    charts: dict[str, Path] = {}
    for run in runs:
        charts |= plots.draw_run(run.rows, folder / "report", title=run.stage.upper(), prefix=f"{run.stage}_")
    images = [f"![{title}](report/{path.name})" for title, path in charts.items()]
    sections = [
        title(runs),
        results(runs),
        core_tasks(runs),
        skipped(runs),
        times(runs, dollars_per_hour, seconds or {}),
        "\n\n".join(["## Curves", *images]) if images else "",
        samples_section(samples),
        model_section(runs),
        environment(runs, machine, dollars_per_hour, root),
        settings(runs),
    ]
    path = folder / "report.md"
    jsonl.write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


# Sections


def title(runs: Sequence[RunInfo]) -> str:
    lines = [f"# Report: {runs[-1].name}", ""]
    for run in runs:
        total = run.meta.get("num_steps") or run.settings.get("num_iterations")
        of = f" of {total:,}" if total and total > run.last_step else ""
        state = f"step {run.step:,}"
        if run is runs[-1] and (run.last_step > run.step or not run.done):
            saved = f"checkpoint of {state}" if run.step else "no checkpoint yet"
            state = f"{saved}, now at step {run.last_step:,}{of}"
        lines.append(f"- **{run.stage.upper()}** `{run.name}`, {state}")
    if first := runs[0].meta.get("parent"):
        lines.append(
            f"- started from `{first['run']}`, step {first['step']:,} ({first['stage']}), whose folder is gone"
        )
    return "\n".join(lines)


def results(runs: Sequence[RunInfo]) -> str:
    """Return the table of metrics by stage, with the missing ones named below it."""
    scores = [run_folder.scores(run) for run in runs]
    present = {name for of_run in scores for name in of_run}
    others = sorted(name for name in present - NAMED.keys() if re.fullmatch("chat/.*(?<!-lenient)", name))
    names = NAMED | {name: name.removeprefix("chat/") for name in others}
    names |= {n: f"bits per byte, {n[8:]}" for n in sorted(present) if n.startswith(("val/bpb/", "val/bpb_ema"))}
    names |= {n: n[4:].replace("_", " ") for n in sorted(present) if n.startswith("val/preference_")}
    names |= {f"rl/pass_at_{k}": f"pass@{k}" for k in (1, 8) if f"rl/pass_at_{k}" in present}
    rows = [pair for name, title in names.items() for pair in ((name, title), (f"{name}-lenient", f"{title}, lenient"))]
    lines = [["", *(run.stage.upper() for run in runs)]]
    partial = False
    for name, title in [(name, title) for name, title in rows if name in present]:
        cells = []
        for run, of_run in zip(runs, scores):
            score = of_run.get(name)
            cell = "-" if score is None else f"{score.value:.4f}"
            if score and not score.complete and name.startswith(("chat/", "core/")):
                cell, partial = f"{cell}\\*", True
            if score and run.step and score.step != run.step:
                cell += f" (step {score.step:,})"
            cells.append(cell)
        lines.append([title, *cells])
    notes = ["CORE and ChatCORE are centered: 0 is random guessing, 1 is perfect. Tasks: accuracy."]
    if any(name.endswith("-lenient") for name in present):
        notes.append("Lenient: of answers with the right number in any form.")
    if runs[0].stage == "base" and len(runs) > 1:
        notes.append("Bits per byte: BASE on documents, later stages on conversations; not comparable.")
    if partial:
        notes.append("\\* measured during training, possibly on a subset of the problems.")
    if missing := [title for name, title in names.items() if name not in present]:
        notes.append(f"Not measured: {', '.join(missing)}. Run `--experiment=eval_base` and `--experiment=eval_chat`.")
    shown = [table(lines)] if len(lines) > 1 else []
    return "\n\n".join(["## Results", *shown, "\n".join(f"- {note}" for note in notes)])


def core_tasks(runs: Sequence[RunInfo]) -> str:
    suffix = "/accuracy"
    scores = {run.stage.upper(): run_folder.scores(run) for run in runs}
    names = {name for of_run in scores.values() for name in of_run if name.startswith("core/")}
    tasks = sorted(name for name in names - {"core/CORE"} if not name.endswith(suffix))
    stages = [stage for stage, of_run in scores.items() if of_run.keys() & tasks]
    lines = [["task", *(f"{stage} {what}" for stage in stages for what in ("accuracy", "centered"))]]
    for task in tasks:
        values = [scores[stage].get(name) for stage in stages for name in (f"{task}{suffix}", task)]
        lines.append([task.removeprefix("core/"), *("-" if x is None else f"{x.value:.4f}" for x in values)])
    return collapsed("CORE by task", table(lines)) if tasks else ""


def skipped(runs: Sequence[RunInfo]) -> str:
    """Return what of the data was not trained on, and why tasks are not measured."""
    lines = []
    for run in runs:
        failed = {name: why for row in run.evaluations for name, why in row["failed"].items()}
        texts = [f"{name}: {why}" for name, why in failed.items() if f"chat/{name}" not in run_folder.scores(run)]
        texts += run.meta.get("loader", {}).get("skipped", [])
        lines += [f"- {run.stage.upper()}: {escaped(text)}" for text in texts]
    return "\n".join(["## Skipped", "", *lines]) if lines else ""


def times(runs: Sequence[RunInfo], dollars_per_hour: float | None, seconds: Mapping[str, float]) -> str:
    def dollars(time: float | None) -> str:
        return "-" if not time or dollars_per_hour is None else f"${time / 3600 * dollars_per_hour:,.2f}"

    lines = [["", "steps", "tokens", "training time", "wall time", "tokens/s", "cost"]]
    total_alone = total_wall = 0.0
    for run in runs:
        tokens, alone, wall = run_folder.step_tokens(run), run_folder.train_seconds(run), run_folder.wall_seconds(run)
        spent = wall or alone  # old runs recorded the steps alone
        total_alone += alone or 0.0
        total_wall += spent or 0.0
        cells = [
            f"{run.last_step:,}",
            format_count(tokens * run.last_step) if tokens else "-",
            format_duration(alone) if alone else "-",
            format_duration(wall) if wall else "-",
            format_count(tokens * run.last_step / alone) if tokens and alone else "-",
            dollars(spent),
        ]
        lines.append([run.stage.upper(), *cells])
    for name, wall in seconds.items():
        total_wall += wall
        lines.append([name, "", "", "", format_duration(wall), "", dollars(wall)])
    totals = [format_duration(total_alone), format_duration(total_wall)]
    lines.append(["total", "", "", *totals, "", dollars(total_wall)])
    text = "Wall time includes the evaluations during training, not later ones, nor the time between stop and resume."
    if dollars_per_hour is not None:
        text += f" Cost: estimated at ${dollars_per_hour:.2f} per hour."
    return "\n\n".join(["## Time", table(lines), text])


def samples_section(samples: Sequence[Sample]) -> str:
    """Return the samples, those of one prompt next to each other."""
    parts = []
    if completions := [f"{sample.prompt}{sample.text}" for sample in samples if sample.stage == "base"]:
        parts += ["Completions of the base model:", fenced("\n\n".join(completions))]
    answers: dict[str, str] = {}
    for sample in samples:
        if sample.stage != "base":
            before = answers.get(sample.prompt, f"user: {sample.prompt}")
            answers[sample.prompt] = f"{before}\n{sample.stage + ':':<6}{sample.text}"
    if answers:
        parts += ["Answers:", fenced("\n\n".join(answers.values()))]
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def model_section(runs: Sequence[RunInfo]) -> str:
    shape = next((run.shape for run in runs if run.shape), None)
    if shape is None:
        return ""
    counts = model.count(shape)
    facts = {
        "layers": f"{shape.n_layer} of width {shape.n_embd}, {shape.n_head} heads of {shape.head_dim}",
        "parameters": f"{counts['total']:,} ({counts['scaling']:,} in matrices and unembedding)",
        "vocabulary": f"{shape.vocab_size:,} tokens",
        "context": f"{shape.sequence_len:,} tokens",
    }
    base = runs[0]
    flops, tokens = run_folder.step_flops(base), run_folder.step_tokens(base)
    if base.stage == "base" and flops and tokens:
        each = tokens * base.last_step / counts["scaling"]
        facts["pretraining"] = f"{flops * base.last_step:.4g} FLOPs, {each:.2f} tokens per scaling parameter"
    for run in runs:
        _, critical = logger.curve(run.rows, noise_scale.TOKENS)
        if critical and (size := run_folder.step_tokens(run)):
            facts[f"critical batch, {run.stage.upper()}"] = noise_scale.describe(critical[-1], size)
    return "\n\n".join(["## Model", facts_table(facts)])


def environment(runs: Sequence[RunInfo], machine: Mapping[str, str], dollars_per_hour: float | None, root: Path) -> str:
    facts = code(root) | {name: escaped(text) for name, text in machine.items()}
    if dollars_per_hour is not None:
        facts["price"] = f"about ${dollars_per_hour:.2f} per hour"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
    if trained := dict.fromkeys(str(run.meta["torch"]) for run in runs if run.meta.get("torch")):
        facts["trained with"] = ", ".join(f"torch {version}" for version in trained)
    return "\n\n".join(["## Code and machine", facts_table(facts), "At the time of this report."])


def code(root: Path) -> dict[str, str]:
    """Return the commit of the checkout at `root`, if git knows it, and the size of the code without the tests."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    facts = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit, _, subject = git("log", "-1", "--format=%H%n%s").partition("\n")
        changed = len(git("status", "--porcelain").splitlines())
        changes = f", with changes in {changed} files" if changed else ""
        facts["commit"] = f"`{commit[:10]}` on {git('rev-parse', '--abbrev-ref', 'HEAD')}{changes}: {escaped(subject)}"
    paths = [root / "launch.py", *(p for folder in ("nanochat", "experiments") for p in (root / folder).rglob("*"))]
    contents = [path.read_bytes() for path in paths if path.suffix in (".py", ".html") and path.is_file()]
    lines, size = sum(c.count(b"\n") for c in contents), sum(map(len, contents))
    project = root / "pyproject.toml"
    needs = tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"] if project.exists() else []
    tokens = f"about {size // 4:,} tokens"
    facts["code"] = f"{len(contents)} files, {lines:,} lines, {size:,} bytes ({tokens}); {len(needs)} dependencies"
    return facts


def settings(runs: Sequence[RunInfo]) -> str:
    parts = []
    for run in runs:
        if flat := tree.flatten(run.settings):
            width = max(map(len, flat))
            text = "\n".join(f"{name:<{width}}  {value}" for name, value in flat.items())
            parts.append(collapsed(f"{run.stage.upper()}: settings of {run.name}", fenced(text)))
    return "\n\n".join(["## Settings", *parts]) if parts else ""


# Markdown


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table, aligned as plain text too; the first row is the header."""
    widths = [max(3, *map(len, column)) for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))]
        return f"| {' | '.join(cells)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def facts_table(facts: Mapping[str, str]) -> str:
    """Return a table of two columns; the texts may be long, so they are not aligned."""
    return "\n".join(["| | |", "|:--|:--|", *(f"| {name} | {text} |" for name, text in facts.items())])


def fenced(text: str) -> str:
    """Return text as a code block that nothing in it can close; unprintable characters are replaced."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def collapsed(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def escaped(text: str) -> str:
    """Escape markdown, for a table cell too."""
    return re.sub(r"([\\`*_<>|[\]])", r"\\\1", text)
