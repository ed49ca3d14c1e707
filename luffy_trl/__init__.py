# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .luffy_config import LuffyConfig
    from .luffy_trainer import LuffyTrainer


__version__ = version("luffy-trl")
__all__ = ["LuffyConfig", "LuffyTrainer"]
_MODULES = {"LuffyConfig": "luffy_config", "LuffyTrainer": "luffy_trainer"}


def __getattr__(name: str):
    """Imports what is asked for, when it is: the command line and grading workers need no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
