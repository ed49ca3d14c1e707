# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Keys in messages, complete or in parts."""

import pytest

from luffy_trl.redaction import Redactor


KEY = "sk-abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Incorrect API key provided: sk-abc***xyz.", "Incorrect API key provided: [key]."),
        ("Incorrect API key provided: sk-ab**************wxyz. You", "Incorrect API key provided: [key]. You"),
        ('{"key": "sk-abcd..."}', '{"key": "[key]"}'),
        ("key …wxyz is wrong", "key [key] is wrong"),
        ("keys sk-abc***xyz and sk-a•••vwxyz", "keys [key] and [key]"),
        (f"key {KEY} or {KEY[:12]}", "key [key] or [key]"),
        ("such as sk-*** or sk-proj-***", "such as sk-*** or sk-proj-***"),
        ("Wait... **abc** is z**2 * 3 ...", "Wait... **abc** is z**2 * 3 ..."),
    ],
)
def test_parts_of_a_key(message, expected):
    hide = Redactor(KEY, "EMPTY")
    assert hide(message) == expected


def test_parts_of_a_key_in_an_answer():
    answer = {"choices": ["key sk-abc***xyz, sk-a•••vwxyz", "sk-abcd...", f"{KEY} {KEY[:12]}"]}
    expected = {"choices": ["key [key], [key]", "sk-abcd...", f"[key] {KEY[:12]}"]}
    assert Redactor(KEY).answer(answer) == expected


def test_answers_keep_words_that_begin_as_a_key_does():
    hide = Redactor("local-development-key")
    text = "The local-developed field, local...global, and 1 ** 2"
    assert hide.answer(text) == "The local-developed field, local...global, and 1 ** 2"
