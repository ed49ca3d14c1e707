# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The options are what users know: names, help, defaults and messages, word for word as `data/options.json` has them, and
the tables of `docs/options.md`.

An option that is added or reworded on purpose is written to both by `python tests/test_options.py`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest


sys.path.insert(0, str(Path(__file__).parent))
import test_luffy_config
import tiny

from luffy_trl import LuffyConfig
from luffy_trl.config_rules import PARAMETERS
from luffy_trl.options import describe, described, options_table, own_fields
from luffy_trl.scripts import train


FILE = Path(__file__).parent / "data" / "options.json"
PAGE = Path(__file__).parent.parent / "docs" / "options.md"
BORDERS = ("<!-- from the docstring of LuffyConfig -->\n", "<!-- end -->\n")


def describe_options():
    """Help and default of each option of this package on the command line."""
    names = {f.name for config in (LuffyConfig, train.LuffyScriptArguments) for f in own_fields(config)}
    return {
        action.dest: {"help": action.help, "default": repr(action.default), "nargs": action.nargs}
        for action in train.make_parser()._actions
        if action.dest in names and not action.option_strings[0].startswith("--no_")
    }


def refused():
    (mark,) = [mark for mark in test_luffy_config.test_refused_options.pytestmark if mark.name == "parametrize"]
    return [options for options, _ in mark.args[1]]


def message_of(options):
    with pytest.raises(ValueError) as error:
        tiny.make_args("out", **options)
    return str(error.value)


def page_with(tables):
    before, _, rest = PAGE.read_text().partition(BORDERS[0])
    return before + BORDERS[0] + "\n" + tables + BORDERS[1] + rest.partition(BORDERS[1])[2]


def test_the_page_of_options():
    assert PAGE.read_text() == page_with(options_table(LuffyConfig))


def test_the_first_paragraph_is_the_help():
    @described
    @dataclass
    class Config:
        """
        Some options.

        Parameters:
            > First

            rate (`float`, *optional*, defaults to `0.5`):
                Share of `rows`, as in [`~trl.GRPOConfig`]: 50% by
                default, or `"all"`.

                More for the page.
            > Second

            names (`list[str]`, *optional*):
                Names.
        """

        rate: float = 0.5
        names: list = field(default_factory=lambda: ["a"])

    assert [f.metadata["help"] for f in own_fields(Config)] == [
        "Share of rows, as in GRPOConfig: 50%% by default, or 'all'.",
        "Names.",
    ]
    assert describe(Config)["rate"][1] == "More for the page."
    head = "\n\n| option | default | what it does |\n| --- | --- | --- |\n"
    assert options_table(Config) == (
        f'## First{head}| `rate` | `0.5` | Share of `rows`, as in [`~trl.GRPOConfig`]: 50% by default, or `"all"`. '
        f"More for the page. |\n\n## Second{head}| `names` | `['a']` | Names. |\n"
    )


def test_an_option_without_a_description():
    with pytest.raises(TypeError, match="The docstring of Config does not describe steps"):

        @described
        @dataclass
        class Config:
            """
            Args:
                rate (`float`):
                    A rate.
            """

            rate: float = 0.5
            steps: int = 1


def test_a_default_with_line_breaks():
    parser = train.make_parser()
    (action,) = [action for action in parser._actions if action.dest == "hint_template"]
    assert r"(default: '{prompt}\n\nHint: {hint}')" in " ".join(parser._get_formatter()._expand_help(action).split())
    assert r'| `hint_template` | `"{prompt}\n\nHint: {hint}"` | The prompt' in PAGE.read_text()
    for line in options_table(LuffyConfig).splitlines():
        assert not line or line.startswith("## ") or (line.startswith("| ") and line.endswith(" |"))


def test_the_help_names_every_choice():
    """A value that is added and not described is one that nobody finds."""
    by_name = {f.name: f for f in own_fields(LuffyConfig)}
    choices = {name: get_args(f.type) for name, f in by_name.items() if get_origin(f.type) is Literal}
    del choices["on_policy_shaping"]  # "the same" as `policy_shaping`
    missing = [
        (name, value)
        for name, values in choices.items()
        for value in values
        if value not in ("none", by_name[name].default) and f"'{value}'" not in by_name[name].metadata["help"]
    ]
    assert missing == []
    for value in PARAMETERS["prefix_schedule_steps"][1]:
        assert f"'{value}'" in by_name["prefix_schedule_steps"].metadata["help"]
    page = (PAGE.parent / "partial_demonstrations.md").read_text()
    assert [value for value in choices["prefix_schedule"] if f'`"{value}"`' not in page] == []


def test_help_and_defaults():
    assert describe_options() == json.loads(FILE.read_text())["options"]


@pytest.mark.parametrize("number", range(len(refused())))
def test_messages(number):
    options, message = json.loads(FILE.read_text())["messages"][number]
    assert message_of(refused()[number]) == message
    assert repr(refused()[number]) == options


if __name__ == "__main__":
    messages = [(repr(options), message_of(options)) for options in refused()]
    PAGE.write_text(page_with(options_table(LuffyConfig)))
    FILE.write_text(json.dumps({"options": describe_options(), "messages": messages}, indent=1) + "\n")
