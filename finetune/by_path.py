"""What a configuration names by its import path, such as `torch.optim.RAdam` or `my_losses.weight`.

A notebook lives longer than an edit: a file of the working directory is run again once it has changed, so that what is
trained with and what is noted about it are one and the same text.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


def import_by_path(path: str) -> Any:
    """The object that `package.module.name` names; modules in the working directory are found, after all others.

    Raises:
        ModuleNotFoundError: if there is no such module.
        AttributeError: if it has no such name.
    """
    module, _, name = path.rpartition(".")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        file = Path(here, *module.split(".")).with_suffix(".py")
        return getattr(_as_written(module, file) if _leads_to(module, file) else importlib.import_module(module), name)
    finally:
        if added:
            sys.path.remove(here)


def source_digest(thing: Any) -> str:
    """SHA-256 of the file that a function or class was made of, and not of what that imports; empty without a file."""
    names = getattr(thing, "__globals__", None) or vars(sys.modules[thing.__module__])
    loader = names.get("__loader__")
    if isinstance(loader, _AsWritten):
        return loader.digest
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:  # an object that can be called
        file = names.get("__file__")
    return _first_digest(file) if file else ""


@functools.cache
def _first_digest(file: str) -> str:
    """Of what Python itself imported, which it does once."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _AsWritten(SourceFileLoader):
    """Runs a file's text, never what Python kept of an earlier one, and knows the digest of that text."""

    digest = ""

    def get_code(self, fullname: str) -> CodeType:
        """Of the file as it is now."""
        source = Path(self.path).read_bytes()
        self.digest = hashlib.sha256(source).hexdigest()
        return self.source_to_code(source, self.path)


def _leads_to(module: str, file: Path) -> bool:
    """Whether the import of `module` reads this file, rather than another of the same name."""
    if not file.is_file():
        return False
    importlib.invalidate_caches()
    spec = find_spec(module)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file.resolve()


def _as_written(name: str, file: Path) -> ModuleType:
    """The module as its file is now."""
    known = sys.modules.get(name)
    loader = getattr(known, "__loader__", None)
    if known and isinstance(loader, _AsWritten) and loader.digest == hashlib.sha256(file.read_bytes()).hexdigest():
        return known
    loader = _AsWritten(name, str(file))
    spec = spec_from_file_location(name, file, loader=loader)
    assert spec is not None, "a loader was given"
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
