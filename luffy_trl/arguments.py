# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
How commands read their options: no abbreviations, and of a misspelled name the nearest is suggested; and what
dotted paths name.
"""

import argparse
import difflib
import importlib
import os
import sys
from types import ModuleType
from typing import Any

from trl import TrlParser


class Parser(TrlParser):
    """A [`~trl.TrlParser`] that takes no abbreviations, and names the option that an unknown one may have meant."""

    def __init__(self, dataclass_types=None, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """In one line, without the names of three hundred options."""
        self.exit(2, f"{self.prog}: {message}. `{self.prog} -h` shows the options.\n")

    def parse_args_into_dataclasses(self, args=None, return_remaining_strings=False, **kwargs):
        """As in transformers, but that unknown options are found before the dataclasses check the others."""
        if not return_remaining_strings:
            args = sys.argv[1:] if args is None else list(args)
            options = [name for name in args if name.startswith("--")]
            unknown = [name for name in options if name.partition("=")[0] not in self._option_string_actions]
            # Before argparse finds that a required one is missing, which may have been misspelled
            unknown = unknown or self.parse_known_args(args)[1]
            if unknown:
                name = first_option(unknown)
                raise ValueError(f"`{self.prog}` knows no argument {name!r}.{suggestion(name, self)}")
        return super().parse_args_into_dataclasses(args, return_remaining_strings, **kwargs)

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        """As in TRL, but that an unknown option of the YAML file is an error here."""
        unknown = super().set_defaults_with_config(**kwargs)
        if unknown:
            name = unknown[0].removeprefix("--")
            raise ValueError(
                f"`{self.prog}` knows no option {name!r}, which the file of `--config` sets."
                f"{suggestion(unknown[0], self).replace('--', '')}"
            )
        return unknown


def first_option(arguments: list[str]) -> str:
    """The first option among arguments that nobody knows; the first of them, if there is none."""
    return next((name for name in arguments if name.startswith("-")), arguments[0]).partition("=")[0]


def suggestion(name: str, *parsers: argparse.ArgumentParser) -> str:
    """A sentence with the option whose name is the nearest, or nothing."""
    names = [option for parser in parsers for action in parser._actions for option in action.option_strings]
    begun = sorted((option for option in names if len(name) > 3 and option.startswith(name)), key=len)
    nearest = begun or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""


def _import_module(name: str) -> ModuleType:
    """A module that is installed, or else one of the current folder, which is searched for nothing before that."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if os.getcwd() in sys.path or error.name not in (name, name.partition(".")[0]):
            raise
        sys.path.append(os.getcwd())
        return importlib.import_module(name)


def load_tools(names: list[str] | None) -> list:
    """The functions of `--tools`."""
    return [load_object(name, "tools") for name in names or []]


def load_object(name: str, option: str) -> Any:
    """A function or class, from its dotted path."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(_import_module(module), attribute)
    except (ValueError, ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"`{option}`: {name!r} cannot be loaded: {error}. It is a function's name behind that of its module, "
            f"which is looked for in the current folder, {os.getcwd()}, and in what is installed."
        ) from error
