"""The embedded corpus: English prose that every Python installation contains, as parquet shards; no network needed.

Sources, in this order: docstrings and comments of the standard library (and of ensurepip's wheels, if present),
docstrings of the modules written in C, the topics of `help()`, licence and other text files. Wrapped lines are joined,
code and tables skipped, repeated paragraphs kept once. Deterministic for a Python version, which `key()` names.
"""

import ast
import gc
import hashlib
import html
import importlib
import importlib.util
import inspect
import itertools
import platform
import re
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = 1  # part of key(): raise it when the text of `documents` changes
MAX_DOC_CHARS = 900  # about; at a paragraph. Packing crops what is longer than a row, and quick runs have short rows
SHARD_CHARS = 1_000_000
ROW_GROUP_DOCS = 200
VAL_FRACTION = 0.04
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
TEXT_SUFFIXES = {".txt", ".rst", ".html"}
# English prose has enough of these words, and enough letters.
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the of to in is are be been was it its this that these those and or not no for on with as by from at if "
        "then when which who what how but so than can may must should will would do does has have had you your we they "
        "their there here all any each only also use used using same other return returns given into such one",
    )
)
# Strings are matched as well, as a "#" inside one does not start a comment.
STRING_OR_COMMENT = re.compile(
    r'''(?s:"""(?:\\.|[^\\])*?"""|\'{3}(?:\\.|[^\\])*?\'{3})|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*'''
)


class Document(NamedTuple):
    subject: str  # a module, class or topic
    text: str


def key() -> str:
    """Return the folder name of this interpreter's corpus."""
    return f"{sys.implementation.name}-{platform.python_version()}-v{VERSION}"


def build(folder: Path) -> None:
    """Write the corpus into an existing folder: shard_00000.parquet, …; the last shard is the validation split.

    Whole subjects go to one split, by their hash, so that no text is divided between them.
    """
    train: list[str] = []
    val: list[str] = []
    collecting = gc.isenabled()
    gc.disable()  # takes a third of the time, as syntax trees are millions of objects without cycles
    try:
        corpus = documents()
    finally:
        if collecting:
            gc.enable()
    for document in sorted(corpus, key=lambda document: _hash(document.text)):
        is_val = int(_hash(document.subject)[:8], 16) < VAL_FRACTION * 2**32
        (val if is_val else train).append(document.text)
    for number, texts in enumerate([*_by_size(train), val]):
        write_shard(folder / f"shard_{number:05d}.parquet", texts, row_group_docs=ROW_GROUP_DOCS)


def write_shard(path: Path, texts: list[str], *, column: str = "text", row_group_docs: int = 1000) -> None:
    """Write documents as a parquet file with one text column."""
    table = pa.table({column: pa.array(texts, pa.large_string())})
    pq.write_table(table, path, row_group_size=row_group_docs, compression="zstd")


def documents() -> list[Document]:
    """Return the corpus, each paragraph once, in the order of the sources."""
    seen: set[str] = set()
    corpus = []
    for subject, entries in itertools.groupby(_sources(), key=lambda entry: entry[0]):
        fresh = []
        for _, name, text in entries:
            prefix = f"{name}: " if name else ""
            for paragraph in paragraphs(text):
                letters = re.sub(r"[^a-z]+", " ", paragraph.lower())
                if letters not in seen:
                    seen.add(letters)
                    fresh.append(prefix + paragraph)
                    prefix = ""
        corpus += [Document(subject, text) for text in _chunks(subject, fresh)]
    return corpus


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _by_size(texts: list[str]) -> Iterator[list[str]]:
    shard: list[str] = []
    chars = 0
    for text in texts:
        shard.append(text)
        chars += len(text)
        if chars >= SHARD_CHARS:
            yield shard
            shard, chars = [], 0
    if shard:
        yield shard


def _chunks(heading: str, parts: list[str]) -> Iterator[str]:
    """Join paragraphs under their heading into texts of about MAX_DOC_CHARS characters."""
    chunk: list[str] = []
    for part in itertools.chain.from_iterable(map(_short, parts)):
        if chunk and len(heading) + sum(map(len, chunk)) + len(part) > MAX_DOC_CHARS:
            yield "\n\n".join([heading, *chunk])
            chunk = []
        chunk.append(part)
    if chunk:
        yield "\n\n".join([heading, *chunk])


def _short(paragraph: str) -> Iterator[str]:
    """Split a paragraph that is longer than a document after sentences."""
    while len(paragraph) > MAX_DOC_CHARS:
        cut = max(paragraph.rfind(end, 0, MAX_DOC_CHARS) for end in (". ", ".\n", "\n", "; ")) + 1
        cut = cut or MAX_DOC_CHARS
        yield paragraph[:cut].strip()
        paragraph = paragraph[cut:].strip()
    if paragraph:
        yield paragraph


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of English prose in `text`, with wrapped lines joined."""
    for block in re.split(r"\n[ \t]*\n", inspect.cleandoc(text.replace("\r", ""))):
        lines = [line.strip().lstrip("|").strip() for line in block.split("\n")]
        lines = [line for line in lines if line.strip("-=~#*^_+.:| ")]
        if any(line.startswith((">>>", "... ", "$ ", "% ")) for line in lines):
            continue
        joined = ""
        for line in lines:
            starts_item = re.match(r"([-*+•] |\(?\d+[.)] |[:@]\w+|[\w.()\[\], *=]+ (--|:) )", line)
            joined += ("\n" if starts_item else " ") + line if joined else line
        joined = re.sub(r"[ \t]+", " ", joined).strip()
        introduces = len(joined) < 100 and joined.endswith(":")  # most likely something skipped
        if is_prose(joined) and not introduces:
            yield joined.replace("::", ":") if joined.endswith("::") else joined


def is_prose(text: str) -> bool:
    """Return whether `text` is English sentences, and not code, a table or a list of names."""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 5 or not text.replace("\n", "").isprintable():
        return False
    common = sum(word.lower() in COMMON_WORDS for word in words)
    letters = sum(char.isalpha() or char == " " for char in text)
    return common >= 0.15 * len(words) and letters >= 0.8 * len(text)


# ---------------------------------------------------------------------------------------------------------------
# Sources: each yields (subject, name within the subject or "", text)


def _sources() -> Iterator[tuple[str, str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(inner.parts) and path.is_file():
            if path.suffix == ".whl":
                yield from _wheel(path)
            elif path.suffix == ".py" or path.suffix in TEXT_SUFFIXES:
                yield from _file(inner, path.read_bytes())
    yield from _compiled_modules()
    yield from _help_topics()


def _wheel(path: Path) -> Iterator[tuple[str, str, str]]:
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            inner = Path(name)
            if SKIPPED_FOLDERS.isdisjoint(inner.parts) and inner.suffix in {".py", *TEXT_SUFFIXES}:
                yield from _file(inner, wheel.read(name))


def _file(path: Path, content: bytes) -> Iterator[tuple[str, str, str]]:
    if path.suffix == ".py":
        name = ".".join(part for part in path.with_suffix("").parts if part != "__init__")
        yield from _docstrings(name, content)
        yield from _comments(name, content)
        return
    text = content.decode("utf-8", errors="ignore")
    if path.suffix == ".html":
        text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"(?s)<(style|script|head).*?</\1>", "", text)))
    yield str(path), "", text


def _docstrings(module: str, source: bytes) -> Iterator[tuple[str, str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # some files are templates, or written for Python 2
        return
    yield module, "", ast.get_docstring(tree) or ""
    classes: list[tuple[str, ast.ClassDef]] = []
    yield from _functions(tree.body, module, classes)
    for subject, node in classes:  # grows while it is read: classes within classes
        yield subject, "", ast.get_docstring(node) or ""
        yield from _functions(node.body, subject, classes)


def _functions(
    body: Sequence[ast.stmt], subject: str, classes: list[tuple[str, ast.ClassDef]]
) -> Iterator[tuple[str, str, str]]:
    """Yield the docstrings of functions; classes are collected for later, so that a subject stays together."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            classes.append((f"{subject}.{node.name}", node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield subject, node.name, ast.get_docstring(node) or ""
            yield from _functions(node.body, subject, classes)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _functions(node.body, subject, classes)
            yield from _functions(getattr(node, "orelse", []), subject, classes)


def _comments(module: str, source: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield the comments of a module as one text: those on adjacent lines form a paragraph."""
    text = source.decode("utf-8", errors="ignore").replace("\r\n", "\n")
    lines: list[str] = []
    last = -1
    for match in STRING_OR_COMMENT.finditer(text):
        if not match[0].startswith("#"):
            continue
        # Unless only a line break and spaces follow the last comment, a new paragraph starts.
        if last < 0 or text[last : match.start()].strip(" \t") != "\n":
            lines.append("")
        lines.append(match[0].lstrip("#!:").strip())
        last = match.end()
    yield f"Notes on {module}", "", "\n".join(lines)


def _compiled_modules() -> Iterator[tuple[str, str, str]]:
    """Yield the docstrings of the standard library's modules that are written in C."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_test", "_xx", "xx")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated modules
            try:
                spec = importlib.util.find_spec(name)
                if spec is None or (spec.origin or "").endswith((".py", ".pyc")) or spec.origin == "frozen":
                    continue
                module = importlib.import_module(name)
            except (ImportError, ValueError):  # built without it, or a library is missing
                continue
        yield name, "", inspect.getdoc(module) or ""
        for label, value in sorted(vars(module).items()):
            if isinstance(value, type):
                yield f"{name}.{label}", "", inspect.getdoc(value) or ""
                for inner, member in sorted(vars(value).items()):
                    yield f"{name}.{label}", inner, (inspect.getdoc(member) or "") if callable(member) else ""
            elif inspect.isbuiltin(value) and not label.endswith("hook"):  # hooks may have been replaced
                yield name, label, inspect.getdoc(value) or ""


def _help_topics() -> Iterator[tuple[str, str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    for name in sorted(topics):
        yield f"Python: {name}", "", topics[name]
