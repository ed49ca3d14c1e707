# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Traces of several messages: an assistant that calls tools, and what they answer.

A rollout of GRPOTrainer with tools is one completion, of the assistant's turns and, between them, of what the chat
template makes of the tools' answers. A trace becomes the same: token ids as of a rollout with the same moves, and
[`Turns`], which say what of it was acted. Tokens of answers and of the template carry no loss, as in rollouts.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import get_json_schema
from trl import GRPOTrainer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
    supports_tool_calling,
)

from .messages import without_none


@dataclass(frozen=True)
class Turns:
    """
    What of a trace was acted, and what was answered.

    Args:
        spans (`list[tuple[int, int]]`):
            Where the tokens of each assistant turn begin and end.
        answers (`list[list[dict]]`):
            The tools' messages after each turn; the last turn has none.
    """

    spans: list[tuple[int, int]]
    answers: list[list[dict[str, Any]]]

    def mask(self, length: int) -> list[int]:
        """1 on acted tokens, 0 on others, for the first tokens of the trace: TRL's `tool_mask`."""
        mask = [0] * length
        for start, end in self.spans:
            mask[start:end] = [1] * (min(end, length) - start)
        return mask

    def parts(self, length: int) -> list[tuple[bool, int, int]]:
        """The first tokens of the trace in parts: whether it was acted, and where it begins and ends."""
        borders = [border for span in self.spans for border in span]
        parts = [(i % 2 == 0, *pair) for i, pair in enumerate(pairwise(borders))]
        return [(acted, start, min(end, length)) for acted, start, end in parts if start < min(end, length)]

    def end_before(self, length: int) -> int:
        """How many tokens the turns have that fit into a length, or the length where not even the first does."""
        ends = [end for _, end in self.spans if end <= length]
        return max(ends, default=length)

    def nearest_border(self, length: int) -> int:
        """The start of a turn, or the end of the trace, that is nearest to a length; 0 is nothing of the trace."""
        borders = [start for start, _ in self.spans] + [self.spans[-1][1]]
        return min(borders, key=lambda border: (abs(border - length), border))

    def messages(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int], tools: list | None
    ) -> list[dict[str, Any]]:
        """The messages of the turns that begin in some first tokens of the trace, as TRL reads those of a rollout."""
        messages = []
        for (start, end), answers in zip(self.spans, self.answers, strict=True):
            if start >= len(ids):
                break
            messages.append(parse_response(tokenizer, ids[start:end], prefix=prompt_ids + ids[:start], tools=tools))
            if end < len(ids):
                messages += answers
        return messages

    def to_json(self) -> str:
        """As a dataset keeps it."""
        return json.dumps([self.spans, self.answers])

    @classmethod
    def from_json(cls, text: str) -> "Turns":
        """From there."""
        spans, answers = json.loads(text)
        return cls([tuple(span) for span in spans], answers)


@dataclass
class Tools:
    """
    The tools of a run, as chat templates take them.

    Args:
        schemas (`dict[str | None, list[dict]]`, *optional*):
            JSON schemas, by the environment that a row names; `None` is that of all rows. Empty without tools.
        chat_template (`str`, *optional*):
            The template that TRL trains with, where the tokenizer's own changes what it has rendered.
    """

    schemas: dict[str | None, list[dict[str, Any]]] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def of_run(
        cls,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        tools: list[Callable] | None,
        environment_factory: Callable | dict[str, Callable] | None,
    ) -> "Tools":
        """
        From the arguments of [`~trl.GRPOTrainer`].

        Raises:
            ValueError: If a tool has no schema, or the chat template no place for tools.
        """
        if not tools and not environment_factory:
            return cls()
        if not supports_tool_calling(processing_class):
            raise ValueError(
                "`tools` and `environment_factory` need a chat template that renders tool calls and the tools' "
                "answers, and that of `processing_class` does not. TRL lists those that do in its docs, under Chat "
                "Templates."
            )
        factories: dict[str | None, Any] = {None: environment_factory}
        if isinstance(environment_factory, dict):
            factories = {**environment_factory}
        schemas = {}
        for name, factory in factories.items():
            instance = factory() if factory is not None else None
            methods = (
                []
                if instance is None
                else [
                    getattr(instance, member)
                    for member, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)
                    if not member.startswith("_") and member not in ("reset", "get_reward")
                ]
            )
            schemas[name] = [_schema(tool) for tool in [*(tools or []), *methods]]
        is_kept = is_chat_template_prefix_preserving(processing_class)
        return cls(schemas, None if is_kept else get_training_chat_template(processing_class))

    def options(self, environment: str | None) -> dict[str, Any]:
        """What the chat template is given for a row."""
        options: dict[str, Any] = {}
        if self.schemas:
            options["tools"] = self.schemas.get(environment, self.schemas.get(None)) or None
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        return options

    def names(self, environment: str | None) -> set[str]:
        """The names of the tools of a row."""
        return {schema["function"]["name"] for schema in self.options(environment).get("tools") or []}


def has_turns(trace: list) -> bool:
    """Whether a trace is more than one message with nothing but its text."""
    return len(trace) > 1 or any(
        isinstance(message, dict) and (message.get("tool_calls") or message.get("reasoning_content"))
        for message in trace
    )


def read_turns(trace: list[dict[str, Any]], name: str, tool_names: set[str]) -> list[tuple[dict, list[dict]]]:
    """
    The turns of a trace: each message of the assistant with the answers that it got, as TRL's loop would write them.

    Args:
        trace (`list[dict]`):
            Messages of the roles `assistant` and `tool`.
        name (`str`):
            What messages of errors call the trace.
        tool_names (`set[str]`):
            The tools that the run has for this row.

    Returns:
        `list[tuple[dict, list[dict]]]`: Messages of the assistant, their tool calls with arguments as a `dict`; and
        those of the tools, in the order of the calls.

    Raises:
        ValueError: If a rollout could not have gone like this; it names the message and the field.
    """
    turns: list[tuple[dict, list[dict]]] = []
    open_calls: list[tuple[str | None, str]] = []  # id and name of the calls that wait for an answer
    for number, message in enumerate(trace):
        place = f"{name}[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "assistant":
            if open_calls:
                raise ValueError(f"{place} comes before the answer to the call of {open_calls[0][1]!r}. Add it.")
            if turns and not turns[-1][1]:
                raise ValueError(
                    f"{place} follows a message of the assistant that calls no tool, and there a rollout has ended. "
                    "Join the two, or drop the trace."
                )
            content = message.get("content")
            if content is not None and not isinstance(content, str):
                raise ValueError(f"{place}: `content` must be a text, got {str(content)[:100]!r}.")
            unknown = [
                key
                for key, value in message.items()
                if value and key not in ("role", "content", "tool_calls", "reasoning_content")
            ]
            if unknown:
                raise ValueError(f"{place} has the field {unknown[0]!r}, which no rollout has. Remove it.")
            content = content or ""
            if message.get("reasoning_content"):
                content = f"<think>\n{message['reasoning_content']}\n</think>\n\n{content}"
            turn: dict[str, Any] = {"role": "assistant", "content": content}
            calls = [
                _read_call(call, f"{place}: `tool_calls[{i}]`", tool_names)
                for i, call in enumerate(message.get("tool_calls") or [])
            ]
            if calls:
                turn["tool_calls"] = [call for _, call in calls]
            turns.append((turn, []))
            open_calls = [(id_, call["function"]["name"]) for id_, call in calls]
        elif role == "tool":
            if not open_calls:
                raise ValueError(f"{place} is an answer of a tool, and no call waits for one. Remove it.")
            id_ = message.get("tool_call_id")
            position = next((i for i, (own, _) in enumerate(open_calls) if id_ is not None and own == id_), None)
            if position is None and id_ is not None and any(own is not None for own, _ in open_calls):
                raise ValueError(f"{place}: `tool_call_id` {id_!r} is of no call that waits for an answer.")
            if position not in (None, 0):
                raise ValueError(
                    f"{place} answers the call of {open_calls[position or 0][1]!r} before that of "
                    f"{open_calls[0][1]!r}. Put answers in the order of the calls."
                )
            _, called = open_calls.pop(0)
            if message.get("name") not in (None, called):
                raise ValueError(f"{place}: `name` is {message['name']!r}, and the call is of {called!r}.")
            content = message.get("content")
            if not isinstance(content, str):
                raise ValueError(f"{place}: `content` must be a text, got {str(content)[:100]!r}.")
            turns[-1][1].append({"role": "tool", "name": called, "content": content})
        else:
            raise ValueError(
                f"{place} must be a message of the role 'assistant' or 'tool', got {str(message)[:100]!r}."
            )
    if open_calls or not turns or turns[-1][1]:
        raise ValueError(f"{name} must end with a message of the assistant that calls no tool. Add what it says.")
    return turns


def _read_call(call: Any, place: str, tool_names: set[str]) -> tuple[str | None, dict[str, Any]]:
    """The id of a tool call, if it has one, and the call as TRL reads it from a rollout."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place} must have a `function` with a `name` and `arguments`, got {str(call)[:100]!r}.")
    if function["name"] not in tool_names:
        has = f"has {', '.join(sorted(tool_names))}" if tool_names else "has no tools"
        raise ValueError(
            f"{place} calls {function['name']!r}, and the run {has}. Pass it in `tools`, or drop the trace."
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as the API of OpenAI writes them
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: `arguments` is no JSON: {error}. Got {arguments[:100]!r}.") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"{place}: `arguments` must be an object, got {str(arguments)[:100]!r}.")
    if not isinstance(function.get("arguments"), str):  # Arrow gives each call the arguments of all others, as None
        arguments = without_none(arguments or {})
    return call.get("id"), {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def answer_ids(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    answers: list[dict[str, Any]],
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any],
) -> list[int]:
    """The tokens between two turns: the tools' answers, and the opening of the next turn. TRL's own, of its loop."""
    is_vlm = isinstance(processing_class, ProcessorMixin)
    trainer = SimpleNamespace(
        processing_class=processing_class,
        _tokenizer=processing_class.tokenizer if is_vlm else processing_class,
        _is_vlm=is_vlm,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
    )
    return GRPOTrainer._get_tool_suffix_ids(trainer, answers)


def _schema(tool: Any) -> dict[str, Any]:
    return get_json_schema(tool) if callable(tool) else tool
