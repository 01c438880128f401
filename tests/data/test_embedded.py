"""The embedded corpus: its size and splits, and what of a small library becomes prose."""

import itertools
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.data import embedded

PROSE = "This is a sentence of plain English, and it is not the only one that we have here."


@pytest.mark.slow
def test_corpus_is_megabytes_of_prose_in_two_splits(tmp_path: Path):
    embedded.build(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(len(paths))] and len(paths) >= 3
    assert all(pq.ParquetFile(path).metadata.row_group(0).num_rows <= embedded.ROW_GROUP_DOCS for path in paths)
    *shards, val = [pq.read_table(path)["text"].to_pylist() for path in paths]
    train = list(itertools.chain(*shards))
    texts = train + val
    # Distributions that package the help topics or ensurepip's wheels apart have less than the 4.4 million here.
    assert sum(map(len, texts)) > 2_000_000 and 0.02 < sum(map(len, val)) / sum(map(len, texts)) < 0.08
    assert sum(char.isalpha() or char.isspace() for text in texts for char in text) > 0.85 * sum(map(len, texts))
    assert max(map(len, texts)) < 1.5 * embedded.MAX_DOC_CHARS
    assert len(set(texts)) == len(texts)
    subjects = [{text.split("\n", 1)[0] for text in split} for split in (train, val)]
    bodies = [{p for text in split for p in text.split("\n\n")[1:] if len(p) > 60} for split in (train, val)]
    assert not subjects[0] & subjects[1] and not bodies[0] & bodies[1], "a text is in both splits"


MODULE = f'''#!/usr/bin/python
"""{PROSE}"""
x = "# this is not a comment, as it is in a string that we have"  # and this is a comment behind the code
y = 1
# One comment is here, and it goes on
# in the line that follows this one.

# {PROSE}
def f():
    """A function that is documented as the module is.

    >>> this = is_not(the, prose) + of_the(day)
    """
    def inner():
        """An inner function that is in the subject of the module."""
if True:
    class A:
        """A class is a subject of its own, with all of its methods."""
        def g(self):
            """The method that we have in the class is here."""
        class B:
            """A class in a class is a subject of its own."""
else:
    async def h():
        """This is a function after the class, and not in it."""
'''


def test_documents_of_a_small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    (library / "m.py").write_text(MODULE)
    (library / "old.py").write_text("print 'Python 2, which this is not, is not read by the parser of today'")
    (library / "test" / "test_m.py").write_text(f'"""{PROSE} And a test."""')
    with zipfile.ZipFile(library / "w.whl", "w") as wheel:
        wheel.writestr("w/__init__.py", f'"""{PROSE[:-1]} in the wheel."""')
    page = "<script>it is not for the reader</script><p>It is &lt; that &gt; the other one.</p>"
    (library / "z.html").write_text(page)
    for name in ("_compiled_modules", "_help_topics"):
        monkeypatch.setattr(embedded, name, lambda: ())
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert embedded.documents() == [
        (
            "m",
            f"m\n\n{PROSE}\n\nf: A function that is documented as the module is."
            "\n\ninner: An inner function that is in the subject of the module."
            "\n\nh: This is a function after the class, and not in it.",
        ),
        (
            "m.A",
            "m.A\n\nA class is a subject of its own, with all of its methods."
            "\n\ng: The method that we have in the class is here.",
        ),
        ("m.A.B", "m.A.B\n\nA class in a class is a subject of its own."),
        (
            "Notes on m",
            "Notes on m\n\nand this is a comment behind the code"
            "\n\nOne comment is here, and it goes on in the line that follows this one.",
        ),
        ("w", f"w\n\n{PROSE[:-1]} in the wheel."),
        ("z.html", "z.html\n\nIt is < that > the other one."),
    ]


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
    assert body == " ".join(parts) and all(chunk.endswith(".") for chunk in chunks)
    assert list(embedded._short("x" * 2000)) == ["x" * 900, "x" * 900, "x" * 200]
