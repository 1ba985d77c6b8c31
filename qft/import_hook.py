"""Doing something when another package is imported: that is how qft meets PEFT in either order of imports.

Python offers one supported way to hear of an import, a finder on `sys.meta_path`. This one finds nothing itself: it
asks the finders behind it and adds one call after the package's own code has run. Where the package is loaded already,
the call is made at once. `importlib.util.find_spec`, with which libraries ask whether a package is installed, loads
nothing and so triggers nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    def __init__(self, package: str, call: Callable[[], object]) -> None:
        self.package, self.call = package, call

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:  # a package that is loaded again is met once
                    sys.meta_path.remove(self)
                    self.call()

            loader.exec_module = run_and_call
        return spec


def when_imported(package: str, call: Callable[[], object]) -> None:
    """Make `call()` once `package` is imported: now where it is already, else right after its own code has run."""
    if package in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(package, call))
