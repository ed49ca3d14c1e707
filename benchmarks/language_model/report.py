# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Tables and plots of the finished runs of run.py.

    python benchmarks/language_model/report.py

It writes `runs.csv` (a line for each split of each evaluation), `answers.csv` (one for each problem), `updates.csv`
(one for each update), `tables.md` and the plots. An interval is of 95%, from a bootstrap over the templates and the
problems of each; `low_problems` and `high_problems` in `runs.csv` are over the problems alone.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from run import METHODS, MODES, SPLITS


matplotlib.use("Agg")
import matplotlib.pyplot as plt


KEYS = ["stage", "start", "method", "condition", "learning_rate", "seed"]
CELL = ["start", "condition", "method"]
NUM_RESAMPLES = 2000


def bootstrap(
    problems: pd.DataFrame, column: str = "correct", over_templates: bool = True, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """
    The 95% interval of the mean of a column.

    Args:
        problems (`pd.DataFrame`): A row for each problem, with its `template`.
        column (`str`, *optional*, defaults to `"correct"`): What is averaged.
        over_templates (`bool`, *optional*, defaults to `True`):
            Whether to draw templates, and then problems of each; or problems alone. Where there is one template only,
            problems are drawn.
        num_resamples (`int`, *optional*, defaults to `2000`): Number of resamples.

    Returns:
        `tuple[float, float]`: Lower and upper end.
    """
    rng = np.random.default_rng(0)
    groups = [group.to_numpy(float) for _, group in problems.groupby("template")[column]]
    if not over_templates:
        groups = [np.concatenate(groups)]
    sums, sizes = np.zeros(num_resamples), np.zeros(num_resamples)
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=num_resamples)
    if len(groups) == 1:
        drawn = np.ones((num_resamples, 1), int)
    for number, values in enumerate(groups):
        for times in range(
            1, drawn[:, number].max() + 1
        ):  # a template that is drawn twice has its problems drawn twice
            rows = drawn[:, number] >= times
            sample = rng.choice(values, (rows.sum(), len(values)))
            sums[rows] += sample.sum(1)
            sizes[rows] += len(values)
    low, high = np.percentile(sums / sizes, [2.5, 97.5])
    return float(low), float(high)


def read(output_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Runs, answers and updates of what has finished."""
    runs, answers, updates = [], [], []
    for file in sorted(output_dir.glob("runs/*/*/result.json")):
        result = json.loads(file.read_text())
        keys = {name: result[name] for name in KEYS}
        kept = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
        runs.append(
            kept | {"peak_reward": max((record.get("reward", np.nan) for record in result["history"]), default=0)}
        )
        for line in (file.parent / "answers.jsonl").read_text().splitlines():
            answers.append(keys | {name: value for name, value in json.loads(line).items() if name != "text"})
        for record in result["history"]:
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            updates.append(keys | numbers)
    if not runs:
        raise ValueError(f"`output_dir`: no run in {output_dir} has finished. run.py makes them.")
    return pd.DataFrame(runs), pd.DataFrame(answers).fillna({"correct": 0.0}), pd.DataFrame(updates)


def summarise(runs: pd.DataFrame, answers: pd.DataFrame, updates: pd.DataFrame) -> pd.DataFrame:
    """A row for each split, mode and update of each run: accuracies with intervals, and what it took to get there."""
    rows = []
    by_run = dict(list(updates.groupby(KEYS))) if len(updates) else {}
    of_runs = runs.set_index(KEYS)
    for keys, problems in answers.groupby([*KEYS, "update", "split", "mode"]):
        run_keys, update = keys[: len(KEYS)], keys[len(KEYS)]
        run = of_runs.loc[run_keys]
        history = by_run.get(
            run_keys, pd.DataFrame({"step": [], "demonstration_tokens": [], "rollout_tokens": [], "seconds": []})
        )
        until = history[history["step"] <= update]
        low, high = bootstrap(problems)
        low_problems, high_problems = bootstrap(problems, over_templates=False)
        rows.append(
            dict(zip([*KEYS, "update", "split", "mode"], keys, strict=True))
            | {
                "problems": len(problems),
                "accuracy": problems["correct"].mean(),
                "low": low,
                "high": high,
                "low_problems": low_problems,
                "high_problems": high_problems,
                **{name: problems[name].mean() for name in ("last_number", "boxed", "ended", "num_tokens")},
                "demonstration_tokens": int(until["demonstration_tokens"].sum()),
                "rollout_tokens": int(until["rollout_tokens"].sum()),
                "trained_tokens": int(until["demonstration_tokens"].sum() + until["rollout_tokens"].sum()),
                "seconds": until["seconds"].sum(),
                "is_last": update == run["num_updates"],
                "weights_moved": run["weights_moved"],
                "commit": run["commit"],
                "device": run["device"],
            }
        )
    return pd.DataFrame(rows)


def over_seeds(answers: pd.DataFrame, split: str, mode: str, column: str = "correct") -> pd.DataFrame:
    """The mean of a column over the seeds, for each problem of a split: in how many of them it is right."""
    rows = answers[(answers["split"] == split) & (answers["mode"] == mode)]
    return rows.groupby(["index", "template"], as_index=False)[column].mean()


def interval(problems: pd.DataFrame, column: str = "correct", sign: str = "") -> str:
    low, high = bootstrap(problems, column)
    return f"{problems[column].mean():{sign}.3f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def rule(num_columns: int) -> str:
    return "|" + " --- |" * num_columns


def results_table(runs: pd.DataFrame, answers: pd.DataFrame, mode: str) -> str:
    """Accuracies after the last update and their intervals, pooled over seeds, a method a line (Markdown)."""
    titles = [split.replace("_", " ") for split in SPLITS]
    header = ["method", "learning rate", "seeds", *titles, "other task, last number", "updates"]
    header += ["trace tokens", "rollout tokens", "minutes"]
    lines = ["| " + " | ".join(header) + " |", rule(len(header))]
    for method, (title, _) in METHODS.items():
        for rate, of_method in runs[runs["method"] == method].groupby("learning_rate"):
            chosen = answers[(answers["method"] == method) & (answers["learning_rate"] == rate)]
            cells = [title, f"{rate:g}" if rate else "", str(of_method["seed"].nunique())]
            cells += [interval(over_seeds(chosen, split, mode)) for split in SPLITS]
            cells.append(interval(over_seeds(chosen, "other_task", mode, "last_number"), "last_number"))
            cells.append(f"{of_method['updates'].mean():.0f}")
            cells += [f"{of_method[name].mean() / 1000:.1f}k" for name in ("demonstration_tokens", "rollout_tokens")]
            cells.append(f"{of_method['seconds'].mean() / 60:.0f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(answers: pd.DataFrame, baseline: str = "sft") -> str | None:
    """Greedy accuracy less that of a baseline on the same problems and seeds, a method a line (Markdown)."""
    if baseline not in set(answers["method"]):
        return None
    lines = ["| method | " + " | ".join(split.replace("_", " ") for split in SPLITS) + " |"]
    lines.append(rule(1 + len(SPLITS)))
    for method, (title, _) in METHODS.items():
        mine, others = (answers[answers["method"] == name] for name in (method, baseline))
        seeds = set(mine["seed"]) & set(others["seed"])
        if method == baseline or not seeds:
            continue
        cells = []
        for split in SPLITS:
            pair = [over_seeds(rows[rows["seed"].isin(seeds)], split, "greedy") for rows in (mine, others)]
            pair = pair[0].merge(pair[1], on=["index", "template"], suffixes=("", "_baseline"))
            pair["difference"] = pair["correct"] - pair["correct_baseline"]
            cells.append(interval(pair, "difference", "+"))
        lines.append(f"| {title} ({len(seeds)} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(summary: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """
    Greedy accuracy of each compared run against its updates and trained tokens, on the problems that all of its
    evaluations share; before the first update, that of the start without training, on the same seed if there is one.
    """
    rows = []
    greedy = answers[(answers["mode"] == "greedy") & (answers["stage"] == "compare")]
    untrained = greedy[greedy["method"] == "zero_shot"]
    for keys, of_run in greedy[greedy["method"] != "zero_shot"].groupby([*KEYS, "split"]):
        names = dict(zip([*KEYS, "split"], keys, strict=True))
        shared = set.intersection(*(set(group["index"]) for _, group in of_run.groupby("update")))
        before = untrained[(untrained["start"] == names["start"]) & (untrained["split"] == names["split"])]
        if (before["seed"] == names["seed"]).any() or names["start"] == "cold":
            before = before[before["seed"] == names["seed"]]
        if len(before):
            of_seed = before[before["index"].isin(shared)]
            rows.append(names | {"update": 0, "trained_tokens": 0, "accuracy": of_seed["correct"].mean()})
        of_summary = summary[(summary[[*KEYS, "split"]] == list(keys)).all(axis=1) & (summary["mode"] == "greedy")]
        tokens = of_summary.set_index("update")["trained_tokens"]
        for update, group in of_run[of_run["index"].isin(shared)].groupby("update"):
            rows.append(
                names | {"update": update, "trained_tokens": tokens[update], "accuracy": group["correct"].mean()}
            )
    return pd.DataFrame(rows, columns=[*KEYS, "split", "update", "trained_tokens", "accuracy"])


def tokens_table(points: pd.DataFrame) -> str:
    """Greedy accuracy where each run has trained on as many tokens as the thriftiest does, between its evaluations."""
    budget = points.groupby([*KEYS])["trained_tokens"].max().min()
    lines = [
        f"| method, {budget / 1000:.1f}k tokens | " + " | ".join(split.replace("_", " ") for split in SPLITS) + " |"
    ]
    lines.append(rule(1 + len(SPLITS)))
    for method, (title, _) in METHODS.items():
        cells = []
        for split in SPLITS:
            of_split = points[(points["method"] == method) & (points["split"] == split)]
            values = [
                np.interp(budget, run["trained_tokens"], run["accuracy"], left=np.nan)
                for _, run in of_split.sort_values("update").groupby(KEYS)
            ]
            cells.append(f"{np.mean(values):.3f}" if values else "")
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table(summary: pd.DataFrame) -> str | None:
    """Greedy accuracy on `validation` by learning rate (Markdown)."""
    tuned = summary[(summary["stage"] == "tune") & (summary["split"] == "validation")]
    if not len(tuned):
        return None
    table = tuned.pivot_table(index=CELL, columns="learning_rate", values="accuracy")
    lines = ["| start | traces | method | " + " | ".join(f"{rate:g}" for rate in table.columns) + " |"]
    lines.append(rule(3 + len(table.columns)))
    for (start, condition, method), values in table.iterrows():
        cells = ["" if np.isnan(value) else f"{value:.3f}" for value in values]
        lines.append(f"| {start} | {condition} | {METHODS[method][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curves(points: pd.DataFrame, start: str, path: Path):
    """Greedy accuracy against updates, and against trained tokens; mean of the seeds, and their range."""
    figure, axes = plt.subplots(2, len(SPLITS), figsize=(13, 7), layout="constrained", sharey="col")
    for row, budget in zip(axes, ("update", "trained_tokens"), strict=True):
        for axis, split in zip(row, SPLITS, strict=True):
            for color, (method, (title, _)) in enumerate(METHODS.items()):
                rows = points[(points["method"] == method) & (points["split"] == split)]
                if len(rows):
                    course = rows.groupby("update").agg(
                        x=(budget, "mean"),
                        mean=("accuracy", "mean"),
                        low=("accuracy", "min"),
                        high=("accuracy", "max"),
                    )
                    axis.plot(course["x"], course["mean"], color=f"C{color}", marker=".", label=title)
                    axis.fill_between(course["x"], course["low"], course["high"], color=f"C{color}", alpha=0.1)
            axis.set_title(split.replace("_", " "))
            axis.set_xlabel("update" if budget == "update" else "trained tokens")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("greedy accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"from the {'cold start' if start == 'cold' else 'base model'}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_cells(answers: pd.DataFrame, path: Path):
    """Greedy accuracy of each method under each condition, with its interval, a line of plots for each start."""
    starts = sorted(answers["start"].unique())
    figure, axes = plt.subplots(
        len(starts), len(SPLITS), figsize=(13, 3.6 * len(starts)), layout="constrained", squeeze=False
    )
    for row, start in zip(axes, starts, strict=True):
        conditions = list(answers.loc[answers["start"] == start, "condition"].unique())
        for axis, split in zip(row, SPLITS, strict=True):
            for color, (method, (title, _)) in enumerate(METHODS.items()):
                for number, condition in enumerate(conditions):
                    cell = answers[(answers[CELL] == [start, condition, method]).all(axis=1)]
                    if len(cell):
                        problems = over_seeds(cell, split, "greedy")
                        mean, (low, high) = problems["correct"].mean(), bootstrap(problems)
                        x = number + 0.09 * (color - len(METHODS) / 2)
                        error = [[max(mean - low, 0)], [max(high - mean, 0)]]
                        axis.errorbar(x, mean, error, fmt="o", color=f"C{color}", capsize=2, label=title)
            axis.set_title(f"{split.replace('_', ' ')}, from {start}")
            axis.set_xticks(range(len(conditions)), conditions)
            axis.grid(alpha=0.3, axis="y")
        row[0].set_ylabel("greedy accuracy")
    labels: dict[str, object] = {}
    for axis in axes.flat:
        labels |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(output_dir: Path, results_dir: Path):
    """Writes the files, tables and plots."""
    runs, answers, updates = read(output_dir)
    summary = summarise(runs, answers, updates)
    results_dir.mkdir(parents=True, exist_ok=True)
    summary.round(5).to_csv(results_dir / "runs.csv", index=False)
    answers.round(3).to_csv(results_dir / "answers.csv", index=False)
    updates.round(6).to_csv(results_dir / "updates.csv", index=False)

    compared = runs[runs["stage"] == "compare"]
    last = answers.merge(compared[[*KEYS, "num_updates"]], on=KEYS)
    last = last[last["update"] == last["num_updates"]]
    sections = [
        f"Commits: {', '.join(sorted(runs['commit'].unique()))}. Devices: {', '.join(runs['device'].unique())}."
    ]
    points = curves(summary, answers)
    for (start, condition), of_cell in compared.groupby(["start", "condition"], sort=False):
        where = f"from the {'cold start' if start == 'cold' else 'base model'}, traces: {condition}"
        of_answers = last[(last["start"] == start) & (last["condition"] == condition)]
        for mode in MODES:
            sections += [f"## After all updates, {where}, {mode}", results_table(of_cell, of_answers, mode)]
        if difference := difference_table(of_answers):
            sections += [f"## Greedy accuracy less that of SFT, {where}", difference]
        of_points = points[(points["start"] == start) & (points["condition"] == condition)]
        if len(of_points):
            sections += [f"## At equal trained tokens, {where}", tokens_table(of_points)]
            if condition == "good":
                plot_curves(of_points, start, results_dir / f"{start}.png")
    still = compared[(~compared["weights_moved"]) & (compared["method"] != "zero_shot")]
    for run in still.itertuples():
        sections.append(
            f"{METHODS[run.method][0]} from {run.start}, seed {run.seed}: {run.updates} updates, highest mean reward "
            f"{run.peak_reward:g}, and no weight has moved."
        )
    if table := tuning_table(summary):
        sections += ["## Learning rates: greedy accuracy on new numbers of the train templates, seed 0", table]
    if len(last):
        plot_cells(last, results_dir / "conditions.png")
    (results_dir / "tables.md").write_text("\n\n".join(sections) + "\n")
    print(f"Tables and plots are in {results_dir}.")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/language_model"), help="Where runs are kept.")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results", help="Where to write.")
    args = parser.parse_args()
    try:
        write(args.output_dir, args.results_dir)
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
