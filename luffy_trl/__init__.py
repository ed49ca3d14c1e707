# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

from importlib.metadata import version

from .luffy_config import LuffyConfig
from .luffy_trainer import LuffyTrainer


__version__ = version("luffy-trl")
__all__ = ["LuffyConfig", "LuffyTrainer"]
