# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Make one HTML file of a run, or of several over each other, from what they wrote to their folders:

    luffy report my_model
    luffy report my_model --watch
    luffy report run_a run_b --output both.html

With `--model`, show which tokens of some traces teach, instead:

    luffy report --model my_model/checkpoint-100 --before Qwen/Qwen2.5-Math-1.5B --dataset_name my_data.jsonl --rows 3
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from ..errors import in_one_line
from ..files import LOCK_FILE, LOG_FILE, RUN_FILE
from .page import build_page, write_page
from .reading import Run, lock_is_free, read_run


_FILES = (LOG_FILE, RUN_FILE, "trainer_state.json")  # by which the folder of a run is known


def make_parser(has_folders: bool = True) -> argparse.ArgumentParser:
    """The parser of the command line; without folders where the options of `luffy train` have values of their own."""
    parser = argparse.ArgumentParser(
        prog="luffy report",
        description=__doc__.strip().splitlines()[0].rstrip(":") + ".",
        epilog="With `--model`, all options of `luffy train` are taken: the weights are those of its objective.",
        allow_abbrev=False,
    )
    parser.set_defaults(folders=[])
    if has_folders:
        parser.add_argument("folders", nargs="*", metavar="RUN_FOLDER", help="The output_dir of a run.")
    parser.add_argument(
        "--output",
        type=Path,
        help="The file. Default: _report.html in the folder of the run, or in the current folder of several; with "
        "--model _tokens.html in the current folder.",
    )
    parser.add_argument(
        "--watch", action="store_true", help="Write it again while the run trains, until it ends. Ctrl-C ends it too."
    )
    parser.add_argument("--every", type=float, default=10.0, help="Seconds between two looks. Default: 10.")
    parser.add_argument(
        "--max_megabytes", type=float, default=10.0, help="Size that groups are sampled for. Default: 10."
    )
    parser.add_argument("--model", help="A checkpoint whose tokens are weighted.")
    parser.add_argument("--before", help="The checkpoint before training, to compare with.")
    parser.add_argument("--rows", type=int, default=3, help="Rows whose traces are shown with --model. Default: 3.")
    return parser


def main(argv: list[str] | None = None):
    """Makes a report."""
    argv = sys.argv[1:] if argv is None else argv
    is_of_a_model = any(word.partition("=")[0] == "--model" for word in argv)
    args, others = make_parser(has_folders=not is_of_a_model).parse_known_args(argv)
    _check(args, others, argv)
    if args.model:
        from .weights import weigh_rows  # which loads torch and the model

        about, pictures = weigh_rows(args.model, args.before, args.rows, others)
        output = args.output or Path("_tokens.html")
        _write(output, build_page([], args.max_megabytes * 1e6, pictures=pictures, about=about))
        return
    output = args.output or (Path(args.folders[0]) if len(args.folders) == 1 else Path()) / "_report.html"
    if not args.watch:
        runs = [read_run(folder) for folder in args.folders]
        _write(output, build_page(_named(runs), args.max_megabytes * 1e6))
        return
    _watch(args, output)


def _check(args: argparse.Namespace, others: list[str], argv: list[str]):
    """Raises a `ValueError` for options that do not belong together."""
    if args.model and (folders := _folders_of(others)):
        command = [word for word in argv if word not in folders]
        command += [] if any("--dataset_name" in word for word in command) else ["--dataset_name", "DATA"]
        raise ValueError(
            "`--model` makes a page of its own, without RUN_FOLDER. Give "
            f"`luffy report {shlex.join(command)}` for it, and `luffy report {shlex.join(folders)}` for the run."
        )
    if not args.model and not args.folders:
        raise ValueError("Give a RUN_FOLDER, the `output_dir` of a run, or `--model`. `luffy report -h` says more.")
    if not args.model and others:
        from ..arguments import first_option  # which loads TRL

        raise ValueError(f"`luffy report` knows no argument {first_option(others)!r}. See `luffy report -h`.")
    if args.model and args.watch:
        raise ValueError("`--watch` is of a run that trains, and `--model` of a checkpoint. Remove one.")
    if args.before and not args.model:
        raise ValueError("`--before` is what `--model` is compared with. Give both.")
    for name in ("every", "max_megabytes", "rows"):
        if not getattr(args, name) > 0:
            raise ValueError(f"`--{name}` must be positive, got {getattr(args, name)}.")


def _folders_of(others: list[str]) -> list[str]:
    """Words that belong to no option: those before the first, and folders of runs behind the value of one."""
    first = next((i for i, word in enumerate(others) if word.startswith("-")), len(others))
    pairs = zip(others[first:], others[first + 1 :], strict=False)
    runs = [
        word
        for previous, word in pairs
        if (not previous.startswith("-") or "=" in previous) and any((Path(word) / n).is_file() for n in _FILES)
    ]
    return others[:first] + runs


def _named(runs: list[Run]) -> list[Run]:
    """Runs whose names differ: of equal ones, the later get a number."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name += f" ({seen[run.name]})"
    return runs


def _watch(args: argparse.Namespace, output: Path):
    """Writes the report whenever the log has grown, until all runs have ended, or their processes have."""
    lengths, has_waited = None, False
    seen: set[str] = set()  # folders whose run has held the lock; one that ends by an error takes it away
    while True:
        held = {folder for folder in args.folders if (Path(folder) / LOCK_FILE).exists()}
        try:
            runs = [read_run(folder) for folder in args.folders]
        except ValueError as error:
            if any(lock_is_free(Path(folder)) for folder in args.folders):
                raise ValueError(f"The run has stopped before its first step: {error}") from None
            if not has_waited:
                print(f"Waiting for the first step: {error}", file=sys.stderr, flush=True)
            has_waited, runs = True, []
        for folder, run in zip(args.folders, _named(runs), strict=False):
            run.has_died = not run.is_over and (run.has_died or folder in seen - held)
        seen |= held
        is_over = bool(runs) and all(run.is_over or run.has_died for run in runs)
        new = [(len(run.log), run.has_died) for run in runs]
        if runs and new != lengths:
            html = build_page(runs, args.max_megabytes * 1e6, refresh=None if is_over else args.every)
            _write(output, html, is_quiet=lengths is not None)
            lengths = new
        if is_over:
            for run in runs:
                if run.has_died:
                    print(f"The run {run.name!r} has stopped before its end.", file=sys.stderr, flush=True)
            return
        time.sleep(args.every)


def _write(output: Path, html: str, is_quiet: bool = False):
    write_page(output, html)
    if not is_quiet:
        size = len(html) / 1e3
        text = f"{size / 1e3:.1f} MB" if size >= 1e3 else f"{size:.0f} kB"
        print(f"The report is {output.resolve().as_uri()} ({text}).", flush=True)


if __name__ == "__main__":
    with in_one_line():
        main()
