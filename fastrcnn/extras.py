"""Optional libraries, each behind an extra of the package."""

import importlib
from types import ModuleType


class MissingExtra(ValueError):
    """An optional library is absent, or cannot be loaded; the message says how to install it."""


def require(name: str, extra: str, why: str) -> ModuleType:
    """Imports an optional library. MissingExtra, which names `why` it is wanted and the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        reason = "" if absent else f" ({error})"
        raise MissingExtra(f"{why}: needs the package {name}: pip install 'fastrcnn[{extra}]'{reason}") from error
