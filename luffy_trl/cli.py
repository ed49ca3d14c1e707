# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The command `luffy`: thin entries to the modules of the package, which run by `python -m` just as well.

`luffy train` and `luffy sft` launch accelerate themselves, as `trl grpo` does: options that the training script does
not know are accelerate's (`--num_processes 2`), and `--accelerate_config` takes a file or the name of a shipped one.
"""

import argparse
import importlib
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


# Commands: the module of each, and what it is for. Those with `make_parser` are launched by accelerate.
LAUNCHED = {
    "train": ("luffy_trl.scripts.train", "train a model with LUFFY or plain GRPO"),
    "sft": ("luffy_trl.scripts.sft", "supervised fine-tuning on the same traces"),
}
PREPARE_DATA = {
    "openr1": ("luffy_trl.data.openr1", "training data from public traces"),
    "generate": ("luffy_trl.data.generate", "traces of your own, from a teacher behind an endpoint"),
    "score": ("luffy_trl.data.score", "the teacher's log-probabilities of traces"),
}
COMMANDS = {
    **LAUNCHED,
    "inspect": (
        "luffy_trl.scripts.inspect_data",
        "what a run would train on: tokens, drops, rewards, memory",
    ),
    "prepare-data": (None, "training data: openr1, generate or score"),
    "prepare-model": ("luffy_trl.prepare_model", "make a base model ready: positions, chat template, EOS"),
    "eval": ("luffy_trl.eval", "evaluate models on the benchmarks of the paper"),
}
PACKAGE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, `sys.argv[1:]` if not given.

    Returns:
        `int`: Exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _make_parser("luffy", COMMANDS)
    parser.add_argument("--version", action="version", version=f"luffy-trl {version('luffy-trl')}")
    command, args = parser.parse_args(argv[:1]).command, argv[1:]
    if command is None:
        parser.print_help()
        return 0
    if command in ("train", "sft", "inspect"):
        args = _with_shipped_recipe(args)
    if command in LAUNCHED:
        return _launch(command, args)
    module = COMMANDS[command][0]
    if command == "prepare-data":
        parser = _make_parser("luffy prepare-data", PREPARE_DATA)
        kind, args = parser.parse_args(args[:1]).command, args[1:]
        if kind is None:
            parser.print_help()
            return 0
        module = PREPARE_DATA[kind][0]
    return _run(module, args)


def _make_parser(prog: str, commands: dict[str, tuple[str | None, str]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, epilog=f"`{prog} COMMAND -h` shows the options of a command.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, help_text) in commands.items():
        subparsers.add_parser(name, help=help_text, add_help=False)
    return parser


def _run(module: str, args: list[str]) -> int:
    """Runs a module as `python -m` does."""
    old_argv, sys.argv = sys.argv, [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = old_argv
    return 0


def _with_shipped_recipe(args: list[str]) -> list[str]:
    """`--config qwen2.5_math_7b` names a recipe of the package, where there is no such file."""
    args = list(args)
    if "--config" not in args[:-1]:
        return args
    place = args.index("--config") + 1
    shipped = PACKAGE / "recipes" / f"{args[place]}.yaml"
    if not Path(args[place]).is_file():
        if not shipped.is_file():
            names = ", ".join(sorted(path.stem for path in shipped.parent.glob("*.yaml")))
            raise SystemExit(f"There is no recipe {args[place]!r}. `--config` takes a YAML file, or one of: {names}.")
        args[place] = str(shipped)
    return args


def _launch(command: str, args: list[str]) -> int:
    """Runs a training script by `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    module = LAUNCHED[command][0]
    # Parsed by argparse alone: the configuration's own checks count processes, of which this is not one.
    script_parser = importlib.import_module(module).make_parser(prog=f"luffy {command}")
    script_parser.add_argument("--config", help="Recipe: a YAML file, or the name of one of the package.")
    _, launch_args = script_parser.parse_known_args(args)
    script_args = _subtract_subsequence(args, launch_args)

    launcher = launch_command_parser()
    if "--accelerate_config" in launch_args[:-1]:
        place = launch_args.index("--accelerate_config") + 1
        shipped = PACKAGE / "accelerate_configs" / f"{launch_args[place]}.yaml"
        if not Path(launch_args[place]).is_file() and shipped.is_file():
            launch_args[place] = str(shipped)
        launch_args = resolve_accelerate_config_argument(launch_args)
    known, unknown = launcher.parse_known_args([*launch_args, "--module", module])
    if unknown or known.training_script != module:
        names = [*unknown, known.training_script]
        name = next((name for name in names if name.startswith("--")), names[0])
        raise SystemExit(f"`luffy {command}` and accelerate know no argument {name!r}. See `luffy {command} -h`.")
    try:
        launch_command(launcher.parse_args([*launch_args, "--module", module, *script_args]))
    except subprocess.CalledProcessError as error:  # the script has said what is wrong
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
