"""The embedded corpus: English prose that every Python installation contains, as parquet shards; no network needed.

It is the standard library's docstrings, comments and text files, and the topics of `help()`; without code, tables and
repeated paragraphs. Deterministic for a Python version, which `key()` names.
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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = 1  # part of key(): raise it when the text of `documents` changes
MAX_DOC_CHARS = 900  # about; at a paragraph. Packing crops what is longer than a row, and quick runs have short rows
SHARD_CHARS = 1_000_000
ROW_GROUP_DOCS = 200
VAL_FRACTION = 0.04
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
SUFFIXES = {".py", ".txt", ".rst", ".html"}
# English prose has enough of these words, and enough letters.
COMMON_TEXT = """
    a an the of to in is are be been was it its this that these those and or not no for on with as by from at if then
    when which who what how but so than can may must should will would do does has have had you your we they their
    there here all any each only also use used using same other return returns given into such one
"""
COMMON_WORDS = frozenset(COMMON_TEXT.split())
# Strings are matched as well, as a "#" inside one does not start a comment.
STRING_OR_COMMENT = re.compile(
    r'''(?s:"""(?:\\.|[^\\])*?"""|\'{3}(?:\\.|[^\\])*?\'{3})|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*'''
)
Entry = tuple[str, str, str]  # subject (a module, class or topic), name within it or "", text


def key() -> str:
    """Return the folder name of this interpreter's corpus."""
    return f"{sys.implementation.name}-{platform.python_version()}-v{VERSION}"


def build(folder: Path) -> None:
    """Write the corpus into an existing folder: shard_00000.parquet, …; the last shard is the validation split.

    Whole subjects go to one split, by their hash, so that no text is divided between them.
    """
    train: list[str] = []
    val: list[str] = []
    gc.disable()  # takes a third of the time, as syntax trees are millions of objects without cycles
    try:
        corpus = documents()
    finally:
        gc.enable()
    for subject, text in sorted(corpus, key=lambda document: _hash(document[1])):
        is_val = int(_hash(subject)[:8], 16) < VAL_FRACTION * 2**32
        (val if is_val else train).append(text)
    write_shards(folder, train, val, SHARD_CHARS, row_group_docs=ROW_GROUP_DOCS)


def write_shards(
    folder: Path, train: Iterable[str], val: list[str], shard_chars: int, *, column: str = "text", row_group_docs: int
) -> None:
    """Write documents as shards of about `shard_chars` characters, and then `val` as the last shard."""
    for number, texts in enumerate(itertools.chain(_by_size(train, shard_chars), [val])):
        write_shard(folder / f"shard_{number:05d}.parquet", texts, column=column, row_group_docs=row_group_docs)


def write_shard(path: Path, texts: list[str], *, column: str = "text", row_group_docs: int = 1000) -> None:
    table = pa.table({column: pa.array(texts, pa.large_string())})
    pq.write_table(table, path, row_group_size=row_group_docs, compression="zstd")


def documents() -> list[tuple[str, str]]:
    """Return (subject, text) of the corpus, each paragraph once, in the order of the sources."""
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
        corpus += [(subject, text) for text in _chunks(subject, fresh)]
    return corpus


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _by_size(texts: Iterable[str], max_chars: int) -> Iterator[list[str]]:
    shard: list[str] = []
    chars = 0
    for text in texts:
        shard.append(text)
        chars += len(text)
        if chars >= max_chars:
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
# Sources


def _sources() -> Iterator[Entry]:
    for path, content in _library_files():
        if path.suffix == ".py":
            name = ".".join(part for part in path.with_suffix("").parts if part != "__init__")
            yield from _docstrings(name, content)
            yield from _comments(name, content)
            continue
        text = content.decode("utf-8", errors="ignore")
        if path.suffix == ".html":
            text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"(?s)<(style|script|head).*?</\1>", "", text)))
        yield str(path), "", text
    yield from _compiled_modules()
    yield from _help_topics()


def _library_files() -> Iterator[tuple[Path, bytes]]:
    """Yield (relative path, content) of the standard library's files and of those in its wheels."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if path.suffix not in {".whl", *SUFFIXES} or not SKIPPED_FOLDERS.isdisjoint(inner.parts) or path.is_dir():
            continue
        if path.suffix != ".whl":
            yield inner, path.read_bytes()
            continue
        with zipfile.ZipFile(path) as wheel:
            for name in map(Path, sorted(wheel.namelist())):
                if name.suffix in SUFFIXES and SKIPPED_FOLDERS.isdisjoint(name.parts):
                    yield name, wheel.read(str(name))


def _docstrings(module: str, source: bytes) -> Iterator[Entry]:
    """Yield the docstrings of a module and its functions, then those of its classes, so that subjects stay together."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # some files are templates, or written for Python 2
        return
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [(module, tree)]
    for subject, scope in scopes:  # grows while it is read: classes within classes
        yield subject, "", ast.get_docstring(scope) or ""
        for node in _definitions(scope.body):
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{subject}.{node.name}", node))
            else:
                yield subject, node.name, ast.get_docstring(node) or ""


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _definitions(node.body)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _definitions(node.body)
            yield from _definitions(getattr(node, "orelse", []))


def _comments(module: str, source: bytes) -> Iterator[Entry]:
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


def _compiled_modules() -> Iterator[Entry]:
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


def _help_topics() -> Iterator[Entry]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    for name in sorted(topics):
        yield f"Python: {name}", "", topics[name]
