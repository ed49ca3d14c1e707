# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A file of JSON lines that only grows, from which a run that was ended goes on where it stood."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """
    Rows by a key, a JSON line each. Lines are only ever added, and of two with the same key the later one counts.
    Memory holds where each line begins. A last line that was cut when its writer was killed is taken off; another that
    cannot be read is an error.
    """

    def __init__(self, path: str | Path, key: str = "key"):
        self.path, self.key = Path(path), key
        self._offsets: dict[Any, int] = {}
        if not self.path.exists():
            return
        end = 0
        with self.path.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                try:
                    self._offsets[json.loads(line)[key]] = end
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise ValueError(
                        f"Line {number} of the journal {path} is damaged, and cannot be read. Remove the line."
                    ) from None
                end += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: Any) -> bool:
        return key in self._offsets

    def __getitem__(self, key: Any) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[key])
            return json.loads(file.readline())

    def add(self, row: dict[str, Any]):
        """Adds a row. When it returns, the operating system has it: a kill cannot take it back."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:  # in one go: another process may write, too
            file.write(line)
            self._offsets[row[self.key]] = file.tell() - len(line)
