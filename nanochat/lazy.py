"""Package pages whose names are imported on first use, so that a setting is checked before torch is there."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that imports what the page lists under `if TYPE_CHECKING:`.

    The list is plain import statements, so editors and type checkers read it as well. Python 3.15 has lazy imports of
    its own (PEP 810) and will not need this.
    """
    page = ast.parse(Path(file).read_bytes())
    block = next(node for node in page.body if isinstance(node, ast.If))
    origins = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def __getattr__(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = origins[name]
        if module == package:
            return importlib.import_module(f"{package}.{attribute}")
        value = getattr(importlib.import_module(module), attribute)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    return __getattr__
