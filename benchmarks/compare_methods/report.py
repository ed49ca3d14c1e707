# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Tables and plots of the comparison, from the files of its runs."""

import json
from pathlib import Path

import matplotlib
import methods
import pandas as pd


matplotlib.use("Agg")
import matplotlib.pyplot as plt


KEYS = ["stage", "task", "condition", "method", "learning_rate", "seed"]


def read(folder: Path, results_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations and gradient weights of all runs in `folder`, a row each, and of earlier ones in `results_dir`."""
    records, weights = [], []
    for file in sorted(folder.glob("*/*.json")):
        run = json.loads(file.read_text())
        keys = {key: run[key] for key in [*KEYS, "commit"]}
        records += [{**keys, **record} for record in run["records"]]
        edges = methods.PROBABILITY_BINS
        for low, high, count, weight in zip(edges, edges[1:], *run["weights"], strict=False):
            weights.append(
                {**keys, "probability_from": low, "probability_to": high, "tokens": count, "weight": weight}
            )
    return with_earlier(records, results_dir / "runs.csv"), with_earlier(weights, results_dir / "weights.csv")


def with_earlier(records: list[dict], file: Path) -> pd.DataFrame:
    """Adds the rows of a file, but for those of runs that have been done again."""
    rows = pd.DataFrame(records, columns=None if records else KEYS)
    if not file.exists():
        return rows
    earlier = pd.read_csv(file)
    done = set(rows[KEYS].itertuples(index=False, name=None))
    is_kept = [keys not in done for keys in earlier[KEYS].itertuples(index=False, name=None)]
    return pd.concat([earlier[is_kept], rows], ignore_index=True)


def best_learning_rates(records: pd.DataFrame) -> dict[tuple[str, str], float]:
    """
    The learning rate of each task and method: that with the best held-out accuracy at the end of its tuning run. Of
    those within a point of the best, that with the best mean over the run.
    """
    best = {}
    for (task, method), runs in records[records["stage"] == "tune"].groupby(["task", "method"]):
        last = runs[runs["step"] == runs["step"].max()].set_index("learning_rate")["held_out"]
        mean = runs.groupby("learning_rate")["held_out"].mean()
        best[task, method] = mean[last[last >= last.max() - 0.01].index].idxmax()
    return best


def at_tokens(run: pd.DataFrame, budget: float, column: str) -> float:
    """The value of a column where a run has trained on `budget` tokens, between its evaluations."""
    run = run.sort_values("step")
    before = run[run["trained_tokens"] <= budget].iloc[-1]
    after = run[run["trained_tokens"] >= budget].iloc[0]
    if before["step"] == after["step"]:
        return before[column]
    share = (budget - before["trained_tokens"]) / (after["trained_tokens"] - before["trained_tokens"])
    return before[column] + share * (after[column] - before[column])


def at_budgets(records: pd.DataFrame) -> pd.DataFrame:
    """
    Accuracies of each run at both budgets: all updates, and as many trained tokens as the thriftiest run of the task
    takes for all updates.
    """
    rows = []
    for _, of_task in records.groupby(["stage", "task"]):
        last = of_task[of_task["step"] == of_task["step"].max()]
        num_tokens = last["trained_tokens"].min()
        splits = ["held_out", *methods.TASKS[of_task["task"].iloc[0]].out_of_distribution, "easy"]
        for keys, run in of_task.groupby(KEYS):
            for budget in ("updates", "tokens"):
                row = dict(zip(KEYS, keys, strict=True), budget=budget)
                for split in splits:
                    row[split] = (
                        run.sort_values("step")[split].iloc[-1]
                        if budget == "updates"
                        else at_tokens(run, num_tokens, split)
                    )
                row["trained_tokens"] = run["trained_tokens"].max() if budget == "updates" else num_tokens
                row["sampled_or_trained_seconds"] = run["seconds"].max()
                rows.append(row)
    return pd.DataFrame(rows)


def spread(values: pd.Series) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def at_best_rates(rows: pd.DataFrame, best: dict[tuple[str, str], float]) -> pd.DataFrame:
    """Leaves out runs of the comparison with other learning rates than the best."""
    is_best = [
        row.stage != "compare" or row.learning_rate == best.get((row.task, row.method), row.learning_rate)
        for row in rows[["stage", "task", "method", "learning_rate"]].itertuples()
    ]
    return rows[is_best]


def comparison_table(results: pd.DataFrame, task: str, budget: str) -> str:
    """Mean and standard deviation over seeds, a method a line (Markdown)."""
    splits = ["held_out", *methods.TASKS[task].out_of_distribution, "easy"]
    lines = [
        "| method | learning rate | " + " | ".join(name.replace("_", " ") for name in splits) + " | trained tokens |",
        "| --- | --- |" + " --- |" * (len(splits) + 1),
    ]
    for method, (title, _) in methods.METHODS.items():
        rows = results[
            (results["task"] == task)
            & (results["budget"] == budget)
            & (results["method"] == method)
            & (results["stage"] == "compare")
        ]
        if len(rows):
            cells = [f"{rows['learning_rate'].iloc[0]:g}", *(spread(rows[split]) for split in splits)]
            cells.append(f"{rows['trained_tokens'].mean() / 1000:.0f}k")
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table(records: pd.DataFrame, task: str) -> str:
    """Held-out accuracy of a tuning run at its end, and in brackets the mean over it, by learning rate (Markdown)."""
    runs = records[(records["stage"] == "tune") & (records["task"] == task)]
    last = runs[runs["step"] == runs["step"].max()].set_index(["method", "learning_rate"])["held_out"]
    mean = runs.groupby(["method", "learning_rate"])["held_out"].mean()
    best = best_learning_rates(records)
    rates = sorted(runs["learning_rate"].unique())
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- |" + " --- |" * len(rates)]
    for method, (title, _) in methods.METHODS.items():
        if (task, method) in best:
            cells = [f"{last[method, rate]:.3f} ({mean[method, rate]:.2f})" for rate in rates]
            cells = [f"**{c}**" if rate == best[task, method] else c for rate, c in zip(rates, cells, strict=True)]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def map_table(results: pd.DataFrame, split: str) -> str:
    """Accuracy after all updates, a method a line and a condition a column (Markdown); the best in bold."""
    rows = results[(results["budget"] == "updates") & (results["task"] == "chains")]
    seeds = rows[rows["stage"] == "map"]["seed"].unique()
    rows = rows[(rows["stage"] == "map") | ((rows["stage"] == "compare") & rows["seed"].isin(seeds))]
    order = ["standard", *rows.loc[rows["stage"] == "map", "condition"].unique()]
    means = rows.groupby(["method", "condition"])[split].mean().unstack()[order].dropna()
    spreads = rows.groupby(["method", "condition"])[split].std().unstack()[order]
    lines = ["| method | " + " | ".join(name.replace("_", " ") for name in order) + " |"]
    lines.append("| --- |" + " --- |" * len(order))
    for method, (title, _) in methods.METHODS.items():
        if method in means.index:
            cells = []
            for condition in order:
                cell = f"{means.loc[method, condition]:.2f} ± {spreads.loc[method, condition]:.2f}"
                is_best = means.loc[method, condition] >= means[condition].max() - 0.01
                cells.append(f"**{cell}**" if is_best else cell)
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curves(records: pd.DataFrame, task: str, path: Path):
    """What the paper plots against the step: accuracies, length, entropy, probability of the demonstrations."""
    records = records[(records["stage"] == "compare") & (records["task"] == task)]
    columns = ["held_out", *methods.TASKS[task].out_of_distribution, "length", "entropy", "demonstration_prob"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axis, column in zip(axes.flat, columns, strict=True):
        for color, (method, (title, _)) in enumerate(methods.METHODS.items()):
            rows = records[records["method"] == method]
            if len(rows):
                course = rows.groupby("step")[column]
                mean, low, high = course.mean(), course.min(), course.max()
                axis.plot(mean.index, mean, color=f"C{color}", label=title)
                axis.fill_between(mean.index, low, high, color=f"C{color}", alpha=0.08)
        axis.set_title(
            {
                "held_out": "held-out accuracy (= reward)",
                "length": "tokens of a completion",
                "entropy": "entropy (nats)",
                "demonstration_prob": "mean probability of demonstration tokens",
            }.get(column, column.replace("_", " ") + " accuracy")
        )
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{task}: mean of {records['seed'].nunique()} seeds, and their range")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_weights(weights: pd.DataFrame, path: Path):
    """Mean gradient weight of a demonstration token by its probability, relative to the mean over all of them."""
    weights = weights[weights["stage"] == "compare"]
    edges = methods.PROBABILITY_BINS
    labels = [f"{low:g}-{high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained", sharey=True)
    for axis, (task, rows) in zip(axes, weights.groupby("task"), strict=True):
        for color, (method, (title, _)) in enumerate(methods.METHODS.items()):
            sums = rows[rows["method"] == method].groupby("probability_from")[["tokens", "weight"]].sum()
            if len(sums) and sums["weight"].sum() > 0:
                mean = sums["weight"] / sums["tokens"].where(sums["tokens"] > 0)
                mean = mean / (sums["weight"].sum() / sums["tokens"].sum())
                axis.plot(labels, mean.to_numpy(), color=f"C{color}", marker=".", label=title)
        axis.set_yscale("log")
        axis.set_title(task)
        axis.set_xlabel("probability of the demonstration token")
        axis.tick_params(axis="x", rotation=45)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient weight, relative to the mean")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(folder: Path, results_dir: Path):
    """Writes `runs.csv`, `weights.csv`, `tables.md` and the plots."""
    records, weights = read(folder, results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    records.round(5).to_csv(results_dir / "runs.csv", index=False)
    weights.round(6).to_csv(results_dir / "weights.csv", index=False)
    # Tables and plots are of the chosen learning rates; the files have all runs
    records, weights = (at_best_rates(rows, best_learning_rates(records)) for rows in (records, weights))
    results = at_budgets(records)
    compared = records[records["stage"] == "compare"]
    sections = [f"Commits: {', '.join(sorted(records['commit'].unique()))}."]
    for task in methods.TASKS:
        num_seeds = compared[compared["task"] == task]["seed"].nunique()
        num_tokens = results[(results["task"] == task) & (results["stage"] == "compare")]["trained_tokens"].min()
        sections += [
            f"## {task}: {methods.NUM_UPDATES} updates, mean ± standard deviation of {num_seeds} seeds",
            comparison_table(results, task, "updates"),
            f"## {task}: {num_tokens / 1000:.0f}k trained tokens",
            comparison_table(results, task, "tokens"),
            f"## {task}: learning rates, held-out accuracy at the end of the tuning run (mean over it)",
            tuning_table(records, task),
        ]
        plot_curves(records, task, results_dir / f"{task}.png")
    plot_weights(weights, results_dir / "weights.png")
    if (records["stage"] == "map").any():
        for split in ("held_out", *methods.TASKS["chains"].out_of_distribution):
            sections += [f"## Map, chains: {split.replace('_', ' ')} accuracy", map_table(results, split)]
    (results_dir / "tables.md").write_text("\n\n".join(sections) + "\n")
    print(f"Tables and plots are in {results_dir}.")
