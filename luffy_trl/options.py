# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Dataclasses of options: their text stands once, in the docstring, and reaches the command line and the docs."""

import inspect
import json
import re
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from types import MappingProxyType

from transformers import TrainingArguments


# `name (`type`, *optional*, defaults to `...`):` of TRL's format, and the paragraphs that are indented below it
_OPTION = re.compile(r"^    (\w+) \(`.*\):\n((?:        .*\n|\n)+)", re.MULTILINE)
_GROUP = re.compile(r"^    > (.*)$", re.MULTILINE)


def own_fields(config: type) -> list[Field]:
    """The fields of a dataclass that none of its bases has."""
    inherited = {name for base in config.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    return [f for f in fields(config) if f.name not in inherited]


def described(config: type) -> type:
    """
    Decorator of a dataclass: gives the options that its docstring has their `help`, the first paragraph there.

    A field of its own that the docstring does not have is a `TypeError`.
    """
    texts = {name: paragraphs[0] for name, paragraphs in describe(config).items()}
    missing = [f.name for f in own_fields(config) if f.name not in texts]
    if missing and not _has_no_docstrings(config):
        raise TypeError(f"The docstring of {config.__name__} does not describe {', '.join(missing)}.")
    for f in fields(config):
        if f.name in texts:
            text = _plain(texts[f.name])
            if isinstance(f.default, str) and not f.default.isprintable():
                text += " (default: %(default)r)"  # argparse then adds none itself, with its line breaks
            f.metadata = MappingProxyType({**f.metadata, "help": text})
    return config


def describe(config: type) -> dict[str, list[str]]:
    """The paragraphs that a docstring has for each option, in Markdown."""
    docstring = inspect.cleandoc(config.__doc__ or "") + "\n"
    return {
        name: [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]
        for name, text in _OPTION.findall(_GROUP.sub("", docstring))
    }


def options_table(config: type) -> str:
    """The options of a dataclass as Markdown, a table for each group of its docstring."""
    docstring = inspect.cleandoc(config.__doc__ or "") + "\n"
    texts, by_name = describe(config), {f.name: f for f in fields(config)}
    tables = []
    for group in docstring.split("\n    > ")[1:]:
        rows = [
            f"| `{name}` | `{_default(by_name[name])}` | {' '.join(texts[name])} |"
            for name, _ in _OPTION.findall(group)
        ]
        tables += [
            f"## {group.splitlines()[0]}",
            "",
            "| option | default | what it does |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    return "\n".join(tables)


def _default(f: Field) -> str:
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _plain(text: str) -> str:
    """Markdown as it reads in a terminal, where argparse formats `%`."""
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", text)
    return re.sub(r"`([^`]*)`", lambda code: code[1].replace('"', "'"), text).replace("%", "%%")


def _has_no_docstrings(config: type) -> bool:
    return config.__doc__ is None or not _OPTION.search(inspect.cleandoc(config.__doc__) + "\n")  # `python -OO`


@contextmanager
def explained_arguments(args: TrainingArguments):
    """Around the checks of transformers and TRL: what YAML reads otherwise than it is meant, and what to do."""
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(args, name) is False:  # YAML's `no`
            setattr(args, name, "no")
    # The option of TRL and of the recipes, under the name that transformers does not warn of
    if args.gradient_checkpointing is not None and getattr(args, "activation_checkpointing", True) is None:
        args.activation_checkpointing = args.gradient_checkpointing
    try:
        yield
    except ValueError as error:
        if "divisible by num_generations" in str(error):
            raise ValueError(
                f"`num_generations={args.num_generations}` does not divide the {args.generation_batch_size} "
                f"completions that are generated at once: `per_device_train_batch_size` "
                f"({args.per_device_train_batch_size}) times {args.world_size} process(es) times "
                f"`steps_per_generation` ({args.steps_per_generation}). Change one of them."
            ) from error
        if "support bf16" in str(error):
            raise ValueError(
                "`bf16=True`, the default, needs a GPU with bf16, and there is none. On a CPU set `use_cpu=True` and "
                "`bf16=False` (`--use_cpu --bf16 false`); on an older GPU `bf16=False`."
            ) from error
        raise
