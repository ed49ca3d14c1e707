# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Keys of endpoints, kept out of messages and files: an endpoint may repeat what it was sent."""

import base64
import html
import re
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit


_SHORTEST = 6  # of a key that is looked for in answers: `EMPTY` is none, and a word that answers use
_MASK = re.compile(r"(?:[*•…]|\.\.)[*•….]*")  # what an endpoint puts in place of the middle of a key
_SHOWN = 4  # characters of a key beside a mask, or this many times as many without one, that are no coincidence


def without_credentials(url: str) -> str:
    """An address without the name, the password and the query that it may hold."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def credentials_of(url: str) -> list[str]:
    """The secret of an address, and the header that is made of it; empty where it holds none."""
    parts = urlsplit(url)
    return basic_auth(unquote(parts.username or ""), unquote(parts.password or ""))


def basic_auth(user: str, password: str) -> list[str]:
    """The secret of a login, and the header that is made of it."""
    return [password or user, base64.b64encode(f"{user}:{password}".encode()).decode()] if user or password else []


class Redactor:
    """
    Replaces keys by `[key]`, however they are written: as they are, percent-encoded, or escaped as in JSON, Python or
    HTML; and parts of them, such as `sk-abc***xyz`. Empty keys do not count.
    """

    def __init__(self, *keys: str):
        self._keys = [key for key in keys if len(key) >= _SHORTEST]
        self._everywhere = self._pattern([key for key in keys if key])
        self._in_answers = self._pattern(self._keys)

    @staticmethod
    def _pattern(keys: list[str]) -> re.Pattern | None:
        patterns = ["".join(map(_written, key)) for key in sorted(keys, key=len, reverse=True)]
        return re.compile("|".join(patterns)) if patterns else None

    def __call__(self, text: Any) -> str:
        """A message without the keys."""
        text = self._everywhere.sub("[key]", str(text)) if self._everywhere else str(text)
        for key in self._keys:
            text = _without_beginning(_without_masked(text, key), key)
        return text

    def answer(self, value: Any) -> Any:
        """What an endpoint has answered, without the keys: a text, or lists and dicts of texts."""
        if isinstance(value, str):
            value = self._in_answers.sub("[key]", value) if self._in_answers else value
            for key in self._keys:
                value = _without_masked(value, key, both_sides=True)
            return value
        if isinstance(value, list):
            return [self.answer(item) for item in value]
        if isinstance(value, dict):
            return {self.answer(name): self.answer(item) for name, item in value.items()}
        return value


def _without_masked(text: str, key: str, both_sides: bool = False) -> str:
    """
    A text without what shows the beginning of a key, its end, or both, with a mask between or beside them. In an
    answer both have to be there: dots after a word with which a key begins are none.
    """
    parts, place = [], 0
    for mask in _MASK.finditer(text):
        before, after = text[place : mask.start()], text[mask.end() : mask.end() + len(key)]
        begun = next((n for n in range(len(key) - 1, 0, -1) if before.endswith(key[:n])), 0)
        ended = next((n for n in range(len(key) - 1, 0, -1) if after.startswith(key[-n:])), 0)
        if begun + ended >= _SHOWN and (begun and ended or not both_sides):
            parts += [before[: len(before) - begun], "[key]"]
            place = mask.end() + ended
    return "".join([*parts, text[place:]])


def _without_beginning(text: str, key: str) -> str:
    """A text without a beginning of a key that is too long to be the mark of its maker, such as `sk-proj-`."""
    for length in range(len(key) - 1, 2 * _SHOWN, -1):
        text = text.replace(key[:length], "[key]")
    return text


def _written(character: str) -> str:
    """A pattern for the ways to write a character."""
    number = ord(character)
    encoded = "".join(f"%(?:25)*(?i:{byte:02x})" for byte in character.encode(errors="surrogatepass"))
    ways = [re.escape(character), encoded, f"u(?i:{number:04x})", f"x(?i:{number:02x})"]
    ways += [f"&#0*{number};", f"&#(?i:x0*{number:x});", re.escape(html.escape(character))]
    return rf"(?:\\|%(?:25)*5[cC]){{0,8}}(?:{'|'.join(dict.fromkeys(ways))})"
