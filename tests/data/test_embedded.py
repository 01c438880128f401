import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.data import embedded

PROSE = "This is a sentence of plain English, and it is not the only one that we have here."


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("embedded")
    start = time.process_time()
    embedded.build(folder)
    return folder, time.process_time() - start


def shard_texts(folder: Path) -> list[list[str]]:
    return [pq.read_table(path)["text"].to_pylist() for path in sorted(folder.iterdir())]


@pytest.mark.slow
def test_corpus_is_megabytes_of_prose(built: tuple[Path, float]):
    folder, seconds = built
    assert seconds < 60
    texts = [text for shard in shard_texts(folder) for text in shard]
    # Distributions that package the help topics or ensurepip's wheels apart have less than the 4.4 million here.
    assert sum(map(len, texts)) > 2_000_000
    letters = sum(char.isalpha() or char.isspace() for text in texts for char in text)
    assert letters > 0.85 * sum(map(len, texts))
    assert max(map(len, texts)) < 1.5 * embedded.MAX_DOC_CHARS
    assert not any(line.startswith(">>>") for text in texts for line in text.split("\n"))


@pytest.mark.slow
def test_splits_share_no_subject_and_no_paragraph(built: tuple[Path, float]):
    paths = sorted(built[0].iterdir())
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(len(paths))] and len(paths) >= 3
    assert all(pq.ParquetFile(path).metadata.row_group(0).num_rows <= embedded.ROW_GROUP_DOCS for path in paths)
    *train, val = shard_texts(built[0])
    texts = list(itertools.chain(*train))
    assert len({*texts, *val}) == len(texts) + len(val)
    assert 0.02 < sum(map(len, val)) / sum(map(len, texts + val)) < 0.08
    subjects = [{text.split("\n", 1)[0] for text in side} for side in (texts, val)]
    assert not subjects[0] & subjects[1]
    bodies = [{p for text in side for p in text.split("\n\n")[1:] if len(p) > 60} for side in (texts, val)]
    assert not bodies[0] & bodies[1]


def test_corpus_is_deterministic(tmp_path: Path):
    """Two processes that hash strings differently, on a part of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("email", "json", "logging"):
        shutil.copytree(library / name, tmp_path / "library" / name)
    code = (
        "import sys, sysconfig\n"
        "from nanochat.data import embedded\n"
        "paths = sysconfig.get_paths()\n"
        "sysconfig.get_paths = lambda *_: {**paths, 'stdlib': sys.argv[1]}\n"
        "print(embedded.documents())"
    )
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / "library")]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.run(command, cwd=Path(__file__).parents[2], env=env, stdout=-1, check=True).stdout)
    assert outputs[0] == outputs[1] and len(outputs[0]) > 100_000


# ---------------------------------------------------------------------------------------------------------------
# Pieces


def test_wrapped_lines_are_joined_except_in_lists():
    text = f"""
    {PROSE}
        It goes on here, indented,
    and here.

    The options are these and no others:
    - the first, which is
      long
    - the second
    """
    assert list(embedded.paragraphs(text)) == [
        f"{PROSE} It goes on here, indented, and here.",
        "The options are these and no others:\n- the first, which is long\n- the second",
    ]


@pytest.mark.parametrize(
    "text",
    [
        ">>> this = is_not(the, prose) + of_the(day)\nand this is what it gives",
        "for i in range(10): self.total[i] += x[i] * (y[i] - z[i]); return self._sum(total)",
        "stmt ::= 'if' expr ':' suite ('elif' expr ':' suite)* ['else' ':' suite]",
        "Too short to say",
        "An example of the use of this is:",
        "\x00 is this the end of the line that we have in the file",
    ],
)
def test_text_that_is_not_prose_is_skipped(text: str):
    assert list(embedded.paragraphs(text)) == []


def test_long_paragraphs_are_split_at_sentences():
    parts = [" ".join([PROSE] * 30), PROSE]
    chunks = list(embedded._chunks("subject", parts))
    assert len(chunks) > 2
    assert all(chunk.startswith("subject\n\n") and len(chunk) <= embedded.MAX_DOC_CHARS + 20 for chunk in chunks)
    body = " ".join(chunk.removeprefix("subject\n\n").replace("\n\n", " ") for chunk in chunks)
    assert body == " ".join(parts)
    assert all(chunk.endswith(".") for chunk in chunks)
    assert list(embedded._short("x" * 2000)) == ["x" * 900, "x" * 900, "x" * 200]


def test_docstrings_are_grouped_by_class():
    source = b'''"""Module."""
def f():
    """F."""
    def inner():
        """Inner."""
if True:
    class A:
        """A."""
        def g(self):
            """G."""
        class B:
            """B."""
    def h():
        """H."""
else:
    async def k():
        """K."""
'''
    assert [entry for entry in embedded._docstrings("m", source) if entry[2]] == [
        ("m", "", "Module."),
        ("m", "f", "F."),
        ("m", "inner", "Inner."),
        ("m", "h", "H."),
        ("m", "k", "K."),
        ("m.A", "", "A."),
        ("m.A", "g", "G."),
        ("m.A.B", "", "B."),
    ]
    assert list(embedded._docstrings("m", b"print 'Python 2'")) == []


def test_adjacent_comments_are_joined_and_strings_are_not_comments():
    source = b"""#!/usr/bin/python
x = "# not a comment"  # behind code
y = '''
# nor this
'''
# one
# two

# three
"""
    [(subject, _, text)] = embedded._comments("m", source)
    assert subject == "Notes on m"
    assert [block.strip() for block in text.split("\n\n")] == ["/usr/bin/python", "behind code", "one\ntwo", "three"]
