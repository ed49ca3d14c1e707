# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Compares the methods of `methods.py` on two tasks, at two equal budgets, and then asks when which of them wins.

    python benchmarks/compare_methods/compare.py --jobs 2

1. Warm models: one for each task and seed.
2. Learning rates: each method with each rate of one grid, on a seed of its own. The held-out accuracy at the end
   decides; among rates within a point of the best, the mean over the run does.
3. The comparison: each method at its learning rate, on the other seeds.
4. The map: the same on the task `chains` with other traces, and with models that succeed more often to begin with.

A run that has finished is not repeated, so that the command can be killed and given again. `--stages report` makes
tables and plots from the runs that there are, and from those that `--results_dir` has of other methods.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import methods
import report
from tqdm import tqdm


TUNING_SEED = 0
MAP_METHODS = ("luffy", "sft", "sft_then_rl", "exgrpo", "hpt", "chord_mu")
MAP_SEEDS = (1, 2, 3, 4, 5)
# What is unlike the comparison: quality of traces, and probability of giving up in the warm-up
MAP_CONDITIONS = {
    "wrong_half": ("wrong_half", None),
    "skipping": ("skipping", None),
    "few": ("few", None),
    "few_problems": ("few_problems", None),
    "sometimes_right": ("good", 0.99),
    "often_right": ("good", 0.9),
}


@dataclass(frozen=True)
class Run:
    """
    One run of the comparison.

    Args:
        stage (`str`): `"tune"`, `"compare"` or `"map"`.
        task (`str`): Name of the task.
        condition (`str`): `"standard"`, or a key of `MAP_CONDITIONS`.
        method (`str`): Name of the method.
        learning_rate (`float`): Its learning rate.
        seed (`int`): Seed of the data, of the warm model and of training.
    """

    stage: str
    task: str
    condition: str
    method: str
    learning_rate: float
    seed: int

    @property
    def quality(self) -> str:
        return MAP_CONDITIONS.get(self.condition, ("good", None))[0]

    @property
    def warm_up(self) -> tuple[str, dict]:
        """Name and settings of the warm model."""
        probability = MAP_CONDITIONS.get(self.condition, ("good", None))[1]
        if probability is None:
            return f"{self.task}_{self.seed}", {}
        return f"{self.task}_{self.seed}_{probability}", {"give_up_probability": probability}

    def file(self, folder: Path) -> Path:
        name = f"{self.task}-{self.condition}-{self.method}-{self.learning_rate:g}-{self.seed}.json"
        return folder / self.stage / name


def warm_up(run: Run, folder: Path):
    name, settings = run.warm_up
    methods.warm_model(run.task, run.seed, folder / "warm" / name, **settings)


def execute(run: Run, folder: Path):
    """Does a run and writes its file, which thus exists only if the run has finished."""
    model_path = methods.warm_model(run.task, run.seed, folder / "warm" / run.warm_up[0], **run.warm_up[1])
    result = methods.run(run.task, run.method, run.learning_rate, run.seed, model_path, run.quality)
    file = run.file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**asdict(run), "commit": commit(), **result}))
    partial.rename(file)


def commit() -> str:
    """The commit that a run comes from."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


def do_all(function, runs: list[Run], folder: Path, jobs: int, description: str):
    """Does what has not been done, in as many processes as there are jobs."""
    if not runs:
        return
    # A process for each core, with one thread
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(function, run, folder) for run in runs]
        for future in tqdm(as_completed(futures), total=len(futures), desc=description):
            future.result()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/compare_methods"), help="Where runs are kept."
    )
    parser.add_argument(
        "--results_dir", type=Path, default=Path(__file__).parent / "results", help="Tables and plots."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Number of runs at a time.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Seeds of the comparison.")
    parser.add_argument(
        "--stages", nargs="+", default=["tune", "compare", "map", "report"], help="What to do of it, in this order."
    )
    parser.add_argument(
        "--conditions", nargs="+", choices=MAP_CONDITIONS, default=list(MAP_CONDITIONS), help="Of the map."
    )
    parser.add_argument(
        "--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS), help="Of all stages."
    )
    args = parser.parse_args()
    folder = args.output_dir.absolute()

    def do(runs: list[Run], description: str):
        runs = [run for run in runs if not run.file(folder).exists()]
        warm = {run.warm_up[0]: run for run in runs}
        do_all(warm_up, list(warm.values()), folder, args.jobs, "Warm models")
        do_all(execute, runs, folder, args.jobs, description)

    everything = list(itertools.product(methods.TASKS, args.methods))
    if "tune" in args.stages:
        do(
            [
                Run("tune", task, "standard", method, learning_rate, TUNING_SEED)
                for (task, method), learning_rate in itertools.product(everything, methods.LEARNING_RATES)
            ],
            "Learning rates",
        )
    if "compare" in args.stages:
        best = report.best_learning_rates(report.read(folder, args.results_dir)[0])
        do(
            [
                Run("compare", task, "standard", method, best[task, method], seed)
                for seed, (task, method) in itertools.product(args.seeds, everything)
            ],
            "Comparison",
        )
    if "map" in args.stages:
        best = report.best_learning_rates(report.read(folder, args.results_dir)[0])
        do(
            [
                Run("map", "chains", condition, method, best["chains", method], seed)
                for seed, condition, method in itertools.product(
                    MAP_SEEDS, args.conditions, [method for method in MAP_METHODS if method in args.methods]
                )
            ],
            "Map",
        )
    if "report" in args.stages:
        report.write(folder, args.results_dir)


if __name__ == "__main__":
    main()
