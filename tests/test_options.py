# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The options are what users know: names, help, defaults and messages, word for word as `data/options.json` has them.

An option that is added or reworded on purpose is written there by `python tests/test_options.py`.
"""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))
import test_luffy_config
import tiny

from luffy_trl import LuffyConfig
from luffy_trl.luffy_config import own_fields
from luffy_trl.scripts import train


FILE = Path(__file__).parent / "data" / "options.json"


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


def test_help_and_defaults():
    assert describe_options() == json.loads(FILE.read_text())["options"]


@pytest.mark.parametrize("number", range(len(refused())))
def test_messages(number):
    options, message = json.loads(FILE.read_text())["messages"][number]
    assert message_of(refused()[number]) == message
    assert repr(refused()[number]) == options


if __name__ == "__main__":
    messages = [(repr(options), message_of(options)) for options in refused()]
    FILE.write_text(json.dumps({"options": describe_options(), "messages": messages}, indent=1) + "\n")
