# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Keys of endpoints, kept out of messages and files: an endpoint may repeat what it was sent."""

import base64
import html
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit


_SHORTEST = 6  # of a key that is looked for in answers: `EMPTY` is none, and a word that answers use


def without_credentials(url: str) -> str:
    """An address without the name, the password and the query that it may hold."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def basic_auth(user: str, password: str) -> list[str]:
    """The secret of a login, and the header that is made of it."""
    return [password or user, base64.b64encode(f"{user}:{password}".encode()).decode()] if user or password else []


class Redactor:
    """
    Replaces keys by `[key]`, however they are written: as they are, percent-encoded, or escaped as in JSON, Python or
    HTML.

    Args:
        *keys (`str`):
            The keys. Empty ones count for nothing.
    """

    def __init__(self, *keys: str):
        self._everywhere = self._pattern([key for key in keys if key])
        self._in_answers = self._pattern([key for key in keys if len(key) >= _SHORTEST])

    @staticmethod
    def _pattern(keys: list[str]) -> re.Pattern | None:
        patterns = ["".join(map(_written, key)) for key in sorted(keys, key=len, reverse=True)]
        return re.compile("|".join(patterns)) if patterns else None

    def __call__(self, text: Any) -> str:
        """A message without the keys."""
        return self._everywhere.sub("[key]", str(text)) if self._everywhere else str(text)

    def answer(self, value: Any) -> Any:
        """What an endpoint has answered, without the keys: a text, or lists and dicts of texts."""
        if isinstance(value, str):
            return self._in_answers.sub("[key]", value) if self._in_answers else value
        if isinstance(value, list):
            return [self.answer(item) for item in value]
        if isinstance(value, dict):
            return {self.answer(name): self.answer(item) for name, item in value.items()}
        return value


def _written(character: str) -> str:
    """A pattern for the ways to write a character."""
    number = ord(character)
    encoded = "".join(f"%(?:25)*(?i:{byte:02x})" for byte in character.encode(errors="surrogatepass"))
    ways = [re.escape(character), encoded, f"u(?i:{number:04x})", f"x(?i:{number:02x})"]
    ways += [f"&#0*{number};", f"&#(?i:x0*{number:x});", re.escape(html.escape(character))]
    return rf"(?:\\|%(?:25)*5[cC]){{0,8}}(?:{'|'.join(dict.fromkeys(ways))})"
