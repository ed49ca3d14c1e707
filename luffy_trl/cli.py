# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
The command `luffy`: thin entries to the modules of the package, which run by `python -m` just as well.

`luffy train` and `luffy sft` launch accelerate themselves, as `trl grpo` does: options that the training script does
not know are accelerate's (`--num_processes 2`), and `--accelerate_config` takes a file or the name of a shipped one.
"""

import argparse
import importlib
import logging
import os
import runpy
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

from .errors import TO_CONTINUE, in_one_line_if_interrupted


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
    "report": ("luffy_trl.report", "a run as one HTML file: curves, groups, recipe; which tokens teach"),
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
    if command in ("train", "sft", "inspect", "report"):
        args = _with_shipped_recipe(args)
    if command in LAUNCHED:
        with in_one_line_if_interrupted(TO_CONTINUE[command]):
            return _launch(command, args)
    module = COMMANDS[command][0]
    if command == "prepare-data":
        parser = _make_parser("luffy prepare-data", PREPARE_DATA)
        kind, args = parser.parse_args(args[:1]).command, args[1:]
        if kind is None:
            parser.print_help()
            return 0
        command, module = kind, PREPARE_DATA[kind][0]
    with in_one_line_if_interrupted(TO_CONTINUE.get(command, "")):
        return _run(module, args)


def _make_parser(prog: str, commands: dict[str, tuple[str | None, str]]) -> argparse.ArgumentParser:
    epilog = f"`{prog} COMMAND -h` shows the options of a command."
    parser = argparse.ArgumentParser(prog=prog, epilog=epilog, allow_abbrev=False)
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
    """Runs a training script by `accelerate launch`: one process in this one, several as its children."""
    from unittest.mock import patch

    script = importlib.import_module(LAUNCHED[command][0])
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of the processes that are launched below, or by `accelerate launch`
        script.run(args, f"luffy {command}")
        return 0

    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    from .arguments import first_option, suggestion

    # Parsed by argparse alone: the configuration's own checks count processes, of which this is not one.
    script_parser = script.make_parser(prog=f"luffy {command}")
    script_parser.add_argument("--config", help="Recipe: a YAML file, or the name of one of the package.")
    script_parser.add_argument("--help-all", action="help", help="Show the options of TRL and transformers too.")
    if {"-h", "--help"} & set(args):
        _hide_options(script_parser, script.OWN_OPTIONS)
    _, launch_args = script_parser.parse_known_args(args)
    script_args = _subtract_subsequence(args, launch_args)

    launcher = launch.launch_command_parser()
    launcher.allow_abbrev = False
    if "--accelerate_config" in launch_args[:-1]:
        place = launch_args.index("--accelerate_config") + 1
        shipped = PACKAGE / "accelerate_configs" / f"{launch_args[place]}.yaml"
        if not Path(launch_args[place]).is_file() and shipped.is_file():
            launch_args[place] = str(shipped)
        launch_args = resolve_accelerate_config_argument(launch_args)
    this_command = ["--module", "luffy_trl", command]
    known, unknown = launcher.parse_known_args([*launch_args, *this_command])
    if unknown or [known.training_script, *known.training_script_args] != this_command[1:]:
        name = first_option([*unknown, known.training_script])
        raise SystemExit(
            f"`luffy {command}` and accelerate know no argument {name!r}."
            f"{suggestion(name, script_parser, launcher)} See `luffy {command} -h`."
        )
    launch_args = _with_processes(_with_defaults(launch_args, known), known)
    # Of what ends a process, the process itself has told
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    # Children must not import from the current folder what is not installed; the script takes the variable away
    with patch.object(launch, "simple_launcher", partial(_run_script, script, f"luffy {command}")):
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            launch.launch_command(launcher.parse_args([*launch_args, *this_command, *script_args]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                print(f"Process {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:  # which all processes got
            return 128 + error.sigval
        except SystemExit as error:
            if not isinstance(error.code, str):
                raise
            print(error.code, file=sys.stderr)
            return 1
        finally:
            os.environ.pop("PYTHONSAFEPATH", None)
    return 0


def _run_script(script, prog: str, args: argparse.Namespace):
    """Runs a training script in this process, in the environment that accelerate would give to another."""
    import torch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    _, environment = prepare_simple_launcher_cmd_env(args)
    before = dict(os.environ)
    os.environ.update(environment)
    os.environ.pop("PYTHONSAFEPATH", None)
    if "OMP_NUM_THREADS" in environment:  # which torch has read by now
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        script.run(args.training_script_args[1:], prog)
    finally:  # whoever calls `main` from Python goes on in an environment of its own
        os.environ.clear()
        os.environ.update(before)


def _with_defaults(launch_args: list[str], known: argparse.Namespace) -> list[str]:
    """Says accelerate's defaults on one device, of which it would warn otherwise."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if known.config_file is not None or Path(default_config_file).is_file() or torch.cuda.device_count() > 1:
        return launch_args
    defaults = {"num_processes": "1", "num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
    return [
        *(part for name, value in defaults.items() if getattr(known, name) is None for part in (f"--{name}", value)),
        *launch_args,
    ]


def _with_processes(launch_args: list[str], known: argparse.Namespace) -> list[str]:
    """Says how several processes are started where there is no GPU: without it accelerate would start one."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    is_chosen = known.multi_gpu or known.use_deepspeed or known.use_fsdp or known.tpu
    if (known.num_processes or 1) == 1 or is_chosen or torch.cuda.is_available():
        return launch_args
    file = known.config_file or default_config_file
    if Path(file).is_file() and load_config_from_file(file).distributed_type != "NO":
        return launch_args
    return ["--multi_gpu", *launch_args]


def _hide_options(parser: argparse.ArgumentParser, names: set[str]):
    """Leaves only some options in the help of a parser."""
    for action in parser._actions:
        if action.dest not in {"help", "config", "help_all", *names}:
            action.help = argparse.SUPPRESS
    parser.epilog = f"`{parser.prog} --help-all` shows the options of TRL and transformers too, and takes them all."


if __name__ == "__main__":
    raise SystemExit(main())
