"""A few hundred short documents of a few words, for runs that train in seconds."""

import json
import random
from pathlib import Path

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "it", "quick", "lazy", "over")


def write(folder: Path) -> list[str]:
    """Write 300 documents as shards into `folder`/text, the last 50 for validation; return them."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + "." for _ in range(300)]
    (folder / "text").mkdir()
    for name, part in {"a": texts[:250], "val": texts[250:]}.items():
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    return texts
