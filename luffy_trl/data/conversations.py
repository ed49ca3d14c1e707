# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Conversations with tools, as people have them, become prompts and traces: a function for `Dataset.map`."""

import json
from typing import Any


_ROLES = {  # of ShareGPT's formats, by the role that a chat template knows
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}


def to_demonstration(row: dict[str, Any], index: int) -> dict[str, Any]:
    """
    Splits a conversation into the prompt, up to the last message of the user, and one trace, what follows it.

    Args:
        row (`dict[str, Any]`):
            A row with `messages`, as the API of OpenAI and TRL have them (`role`, `content`, `tool_calls`), or with
            `conversations`, as ShareGPT has them (`from`, `value`; a call is a `function_call` with the JSON of its
            `name` and `arguments`, and its answer an `observation`).
        index (`int`):
            Number of the row, for messages of errors.

    Returns:
        `dict[str, Any]`: `prompt` and `demonstrations`. Arguments of calls are JSON texts, since rows of a dataset
        have the same fields.

    Raises:
        ValueError: If the row has no conversation, or nothing follows the user's last message.

    Example:

    ```python
    dataset = dataset.map(to_demonstration, with_indices=True, remove_columns=dataset.column_names)
    ```
    """
    messages = row.get("messages") or row.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"row {index} has no list of messages in `messages` or `conversations`, only {sorted(row)}.")
    messages = [_read(message, index, number) for number, message in enumerate(messages)]
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None or last + 1 == len(messages):
        raise ValueError(f"row {index}: no message follows one of the user. Drop the row, or add what was answered.")
    return {"prompt": messages[: last + 1], "demonstrations": [messages[last + 1 :]]}


def _read(message: Any, index: int, number: int) -> dict[str, Any]:
    """A message in one format, with all fields."""
    if not isinstance(message, dict) or not {"role", "from"} & message.keys():
        raise ValueError(f"row {index}, message {number} has neither `role` nor `from`: {str(message)[:100]!r}.")
    kind = message.get("role") or message["from"]
    role, content = _ROLES.get(kind, kind), message.get("content", message.get("value"))
    calls = message.get("tool_calls") or []
    if kind == "function_call":
        try:
            written = json.loads(content)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"row {index}, message {number} is a call, and no JSON: {error}.") from error
        calls, content = [{"function": call} for call in (written if isinstance(written, list) else [written])], ""
    return {
        "role": role,
        "content": content,
        "name": message.get("name"),
        "tool_call_id": message.get("tool_call_id"),
        "tool_calls": [_call(call, index, number) for call in calls] or None,
    }


def _call(call: Any, index: int, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"row {index}, message {number}: a call has no `function` with a `name`: {str(call)[:100]!r}."
        )
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": text}}
