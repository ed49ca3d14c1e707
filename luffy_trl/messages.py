# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Messages as a dataset gives them back. Nothing here needs torch, so that reports can read with it."""

from typing import Any


def clean_prompt(prompt: Any) -> Any:
    """A prompt whose messages have no fields that Arrow has added: it gives each those of all others, as None."""
    if not isinstance(prompt, list):
        return prompt
    return [
        {key: without_none(own) for key, own in message.items() if own is not None or key == "content"}
        if isinstance(message, dict)
        else message
        for message in prompt
    ]


def without_none(value: Any) -> Any:
    """Arguments of a call, without those of all others."""
    if isinstance(value, dict):
        return {key: without_none(own) for key, own in value.items() if own is not None}
    return [without_none(own) for own in value] if isinstance(value, list) else value
