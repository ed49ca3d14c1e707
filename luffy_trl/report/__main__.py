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
import sys
import time
from pathlib import Path

from ..errors import in_one_line
from .page import build_page, write_page
from .reading import Run, read_run


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
        "--output", type=Path, help="The file. Default: _report.html in the folder of the run, or here of several."
    )
    parser.add_argument("--watch", action="store_true", help="Write it again while the run trains, until it ends.")
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
    _check(args, others)
    if args.model:
        from .weights import weigh_rows  # which loads torch and the model

        pictures = weigh_rows(args.model, args.before, args.rows, others)
        output = args.output or Path("_report.html")
        _write(output, build_page([], args.max_megabytes * 1e6, pictures=pictures))
        return
    output = args.output or (Path(args.folders[0]) if len(args.folders) == 1 else Path()) / "_report.html"
    if not args.watch:
        runs = [read_run(folder) for folder in args.folders]
        _write(output, build_page(_named(runs), args.max_megabytes * 1e6))
        return
    _watch(args, output)


def _check(args: argparse.Namespace, others: list[str]):
    """Raises a `ValueError` for options that do not belong together."""
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


def _named(runs: list[Run]) -> list[Run]:
    """Runs whose names differ: of equal ones, the later get a number."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name += f" ({seen[run.name]})"
    return runs


def _watch(args: argparse.Namespace, output: Path):
    """Writes the report whenever the log has grown, until all runs have ended."""
    lengths, has_waited = None, False
    while True:
        try:
            runs = _named([read_run(folder) for folder in args.folders])
        except ValueError as error:
            if not all(Path(folder).is_dir() for folder in args.folders):
                raise
            if not has_waited:
                print(f"Waiting for the first step: {error}", file=sys.stderr, flush=True)
            has_waited, runs = True, []
        is_over = bool(runs) and all(run.is_over for run in runs)
        if runs and (new := [len(run.log) for run in runs]) != lengths:
            html = build_page(runs, args.max_megabytes * 1e6, refresh=None if is_over else args.every)
            _write(output, html, is_quiet=lengths is not None)
            lengths = new
        if is_over:
            return
        time.sleep(args.every)


def _write(output: Path, html: str, is_quiet: bool = False):
    write_page(output, html)
    if not is_quiet:
        print(f"The report is {output.resolve().as_uri()} ({len(html) / 1e6:.1f} MB).", flush=True)


if __name__ == "__main__":
    with in_one_line():
        main()
