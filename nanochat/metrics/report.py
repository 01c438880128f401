"""The report of a run and its ancestors: one markdown page, with its charts as SVG files beside it.

Everything is read from the run folders. What is missing is a dash or a missing section, so a report can be written for
a run that is still training, was never evaluated, or has lost a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import jsonl, model
from nanochat.distributed import hardware
from nanochat.metrics import plots, run_folder
from nanochat.metrics.run_folder import RunInfo
from nanochat.text import format_count, format_duration

STAGES = ("base", "mid", "sft", "rl")
# The first rows of the results table; other metrics follow.
NAMED = (
    ("CORE", "core/CORE"),
    ("ARC-Easy", "chat/ARC-Easy"),
    ("ARC-Challenge", "chat/ARC-Challenge"),
    ("MMLU", "chat/MMLU"),
    ("GSM8K", "chat/GSM8K"),
    ("HumanEval", "chat/HumanEval"),
    ("SpellingBee", "chat/SpellingBee"),
    ("ChatCORE", "chat/ChatCORE"),
    ("bits per byte", "val/bpb"),
)
PASS = "rl/pass_at_"


class Sample(NamedTuple):
    """A model's completion of a prompt (of a conversation if `chat`); `title` is the run's stage."""

    title: str
    prompt: str
    text: str
    chat: bool


class Machine(NamedTuple):
    """Facts about the machine by name, and the price of its GPUs, None without one."""

    facts: Mapping[str, str]
    dollars_per_hour: float | None


def write(
    runs: Sequence[RunInfo],
    here: Machine,
    samples: Sequence[Sample] = (),
    *,
    seconds: Mapping[str, float] | None = None,
    root: Path = hardware.ROOT,
) -> Path:
    """Write report.md and its charts into the folder of the last of `runs`; return the path of report.md.

    Args:
        runs: the oldest first, as from `run_folder.ancestors`.
        seconds: what else took time -> seconds. root: the folder of the code.
    """
    folder = runs[-1].folder
    charts: dict[str, Path] = {}
    for one in runs:
        charts |= plots.draw_run(one.rows, folder / "report", title=one.stage.upper(), prefix=f"{one.stage}_")
    sections = [
        title(runs),
        results(runs),
        core_tasks(runs),
        times(runs, here.dollars_per_hour, seconds or {}),
        curves_section(charts),
        samples_section(samples),
        model_section(runs),
        environment(runs, here, root),
        settings(runs),
    ]
    path = folder / "report.md"
    jsonl.write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


# Sections


def title(runs: Sequence[RunInfo]) -> str:
    lines = [f"# Report: {runs[-1].name}", ""]
    for one in runs:
        total = one.meta.get("num_steps") or one.settings.get("num_iterations")
        of = f" of {total:,}" if total and total > one.last_step else ""
        if not one.step:
            state = f"no checkpoint yet, step {one.last_step:,}{of}"
        elif one.last_step > one.step and one is runs[-1]:
            state = f"checkpoint of step {one.step:,}, now at step {one.last_step:,}{of}"
        elif one is runs[-1] and not one.done:
            state = f"step {one.step:,}{of}, not finished"
        else:
            state = f"step {one.step:,}"
        lines.append(f"- **{one.stage.upper()}** `{one.name}`, {state}")
    first = runs[0].parent
    if first:
        lines.append(
            f"- started from `{first['run']}`, step {first['step']:,} ({first['stage']}), whose folder is gone"
        )
    return "\n".join(lines)


def results(runs: Sequence[RunInfo]) -> str:
    """Return the table of metrics by stage, with the missing ones named below it."""
    by_stage = {one.stage: run_folder.scores(one) for one in runs}
    present = {key for scores in by_stage.values() for key in scores}
    named = [key for _, key in NAMED]
    others = sorted(key for key in present - set(named) if key.startswith("chat/"))
    rows = [*NAMED, *((key.removeprefix("chat/"), key) for key in others)]
    rows += [(f"pass@{k}", f"{PASS}{k}") for k in (1, 8) if f"{PASS}{k}" in present]
    steps = {one.stage: one.step for one in runs}
    stages = [stage for stage in STAGES if stage in by_stage]
    lines = [["", *(stage.upper() for stage in stages)]]
    notes = ["CORE and ChatCORE are centered: 0 is random guessing, 1 is perfect. Tasks: accuracy."]
    if "base" in by_stage and len(by_stage) > 1:
        notes.append("Bits per byte: BASE on documents, later stages on conversations; not comparable.")
    partial = "\\* measured during training, possibly on a subset of the problems."
    missing = [title for title, key in rows if key not in present]
    for title, key in rows:
        if key not in present:
            continue
        cells = []
        for stage in stages:
            score = by_stage[stage].get(key)
            cell = "-" if score is None else f"{score.value:.4f}"
            if score and not score.complete and key.startswith(("chat/", "core/")):
                cell += "\\*"
                notes += [partial] * (partial not in notes)
            if score and steps[stage] and score.step != steps[stage]:
                cell += f" (step {score.step:,})"
            cells.append(cell)
        lines.append([title, *cells])
    if missing:
        notes.append(f"Not measured: {', '.join(missing)}. Run `--experiment=eval_base` and `--experiment=eval_chat`.")
    shown = [table(lines)] if len(lines) > 1 else []
    return "\n\n".join(["## Results", *shown, "\n".join(f"- {note}" for note in notes)])


def core_tasks(runs: Sequence[RunInfo]) -> str:
    """Return the CORE tasks by stage, collapsed; empty if there are none."""
    by_stage = {one.stage: run_folder.scores(one) for one in runs}
    prefix, suffix = "core/", "/accuracy"
    keys = {key for scores in by_stage.values() for key in scores}
    names = sorted(k.removeprefix(prefix) for k in keys if k.startswith(prefix) and not k.endswith(suffix))
    names = [name for name in names if name != "CORE"]
    stages = [stage for stage in STAGES if any(f"{prefix}{name}" in by_stage.get(stage, {}) for name in names)]
    if not names:
        return ""
    lines = [["task", *(f"{stage.upper()} {what}" for stage in stages for what in ("accuracy", "centered"))]]
    for name in names:
        cells = []
        for stage in stages:
            for key in (f"{prefix}{name}{suffix}", f"{prefix}{name}"):
                score = by_stage[stage].get(key)
                cells.append("-" if score is None else f"{score.value:.4f}")
        lines.append([name, *cells])
    return collapsed("CORE by task", table(lines))


def times(runs: Sequence[RunInfo], dollars_per_hour: float | None, seconds: Mapping[str, float]) -> str:
    lines = [["", "steps", "tokens", "training time", "wall time", "tokens/s", "cost"]]
    totals = [0.0, 0.0]
    for one in runs:
        tokens, alone, wall = run_folder.step_tokens(one), run_folder.train_seconds(one), run_folder.wall_seconds(one)
        spent = wall or alone  # old runs recorded the steps alone
        totals = [total + (x or 0.0) for total, x in zip(totals, (alone, spent))]
        speed = tokens * one.last_step / alone if tokens and alone else None
        cells = [
            f"{one.last_step:,}",
            format_count(tokens * one.last_step) if tokens else "-",
            format_duration(alone) if alone else "-",
            format_duration(wall) if wall else "-",
            format_count(speed) if speed else "-",
            dollars(spent, dollars_per_hour),
        ]
        lines.append([one.stage.upper(), *cells])
    for name, wall in seconds.items():
        totals[1] += wall
        lines.append([name, "", "", "", format_duration(wall), "", dollars(wall, dollars_per_hour)])
    sums = (format_duration(total) for total in totals)
    lines.append(["total", "", "", *sums, "", dollars(totals[1], dollars_per_hour)])
    text = "Wall time includes the evaluations during training, not later ones, nor the time between stop and resume."
    if dollars_per_hour is not None:
        text += f" Cost: estimated at ${dollars_per_hour:.2f} per hour."
    return "\n\n".join(["## Time", table(lines), text])


def dollars(seconds: float | None, dollars_per_hour: float | None) -> str:
    return "-" if not seconds or dollars_per_hour is None else f"${seconds / 3600 * dollars_per_hour:,.2f}"


def curves_section(charts: Mapping[str, Path]) -> str:
    images = [f"![{title}](report/{path.name})" for title, path in charts.items()]
    return "\n\n".join(["## Curves", *images]) if images else ""


def samples_section(samples: Sequence[Sample]) -> str:
    """Return the samples, those of one prompt next to each other."""
    parts = []
    for chat, title in ((False, "Completions of the base model:"), (True, "Answers:")):
        chosen = [sample for sample in samples if sample.chat == chat]
        blocks = []
        for prompt in dict.fromkeys(sample.prompt for sample in chosen):
            same = [sample for sample in chosen if sample.prompt == prompt]
            lines = [f"{one.title + ':':<6}{one.text}" if chat else f"{prompt}{one.text}" for one in same]
            blocks.append("\n".join([f"user: {prompt}", *lines] if chat else lines))
        parts += [title, fenced("\n\n".join(blocks))] if blocks else []
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def model_section(runs: Sequence[RunInfo]) -> str:
    shape = next((one.shape for one in runs if one.shape), None)
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
    return "\n\n".join(["## Model", facts_table(facts)])


def environment(runs: Sequence[RunInfo], here: Machine, root: Path) -> str:
    """Return the state of the code, the machine, and package versions."""
    facts = {}
    if git := hardware.git_info(root):
        changed = f", with changes in {git.changed} files" if git.changed else ""
        facts["commit"] = f"`{git.commit[:10]}` on {git.branch}{changed}: {escaped(git.subject)}"
    size = hardware.code_size(root)
    facts["code"] = (
        f"{size.files} files, {size.lines:,} lines, {size.bytes:,} bytes (about {size.bytes // 4:,} tokens); "
        f"{size.dependencies} dependencies"
    )
    facts |= {name: escaped(text) for name, text in here.facts.items()}
    if here.dollars_per_hour is not None:
        facts["price"] = f"about ${here.dollars_per_hour:.2f} per hour"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in hardware.versions().items())
    trained = dict.fromkeys(str(one.meta["torch"]) for one in runs if one.meta.get("torch"))
    if trained:
        facts["trained with"] = ", ".join(f"torch {version}" for version in trained)
    return "\n\n".join(["## Code and machine", facts_table(facts), "At the time of this report."])


def settings(runs: Sequence[RunInfo]) -> str:
    parts = []
    for one in runs:
        if flat := dotted(one.settings):
            width = max(map(len, flat))
            text = "\n".join(f"{name:<{width}}  {value}" for name, value in flat.items())
            parts.append(collapsed(f"{one.stage.upper()}: settings of {one.name}", fenced(text)))
    return "\n\n".join(["## Settings", *parts]) if parts else ""


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


# Markdown


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table, aligned as plain text too; the first row is the header."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))]
        return f"| {' | '.join(cells)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])])


def facts_table(facts: Mapping[str, str]) -> str:
    """Return a table of two columns; the texts may be long, so they are not aligned."""
    return "\n".join(["| | |", "|:--|:--|", *(f"| {name} | {text} |" for name, text in facts.items())])


def fenced(text: str) -> str:
    """Return text as a code block that nothing in it can close; unprintable characters are replaced."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def collapsed(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def escaped(text: str) -> str:
    """Escape markdown, for a table cell too."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return text
